"""Other services' own client packages against a real service: what docs/clients.md shows works.

Each section's code runs in a process of its own, as a user's would, and then the checks below. A
package that is not installed is skipped: the extra `clients` has those that fit beside ours, `make
clients` puts the others into .venv-clients.
"""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import encode, make_picture
from toys import listening

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "clients.md"
OTHER_PYTHON = ROOT / ".venv-clients" / "bin" / "python"

NOT_CLIPS_TOKENS = """
import tiktoken

# Its vocabulary would be fetched; LangChain only passes the numbers on.
ranks = {bytes([i]): i for i in range(256)}
bytes_alone = tiktoken.Encoding(
    "bytes", pat_str=r"[\\s\\S]", mergeable_ranks=ranks, special_tokens={}
)
tiktoken.get_encoding = tiktoken.encoding_for_model = lambda name: bytes_alone
"""
ONE_FILE_ALONE = """
import importlib.util
import sys
import types

# The package's own __init__ wants torch, faiss and spark, which its client does not.
package = types.ModuleType("clip_retrieval")
package.__path__ = importlib.util.find_spec("clip_retrieval").submodule_search_locations
sys.modules["clip_retrieval"] = package
"""
SETUPS = {"clip-retrieval": ONE_FILE_ALONE}

CHECKS = {
    "clipserve": """
close(vectors, expected["texts"])
close(image, expected["image"])
assert predictions[0].probability >= predictions[1].probability
assert len(hits) == 3
assert [len(one) for one in lists] == [3, 3]
assert tags[0].probability >= tags[1].probability
assert (job["state"], job["done"]) == ("done", 3)
assert [item["id"] for item in stored] == ["beret", "cap", "hat"]
with clipserve.Client(ADDRESS) as client:
    assert client.search(image="shoe.jpg", k=1)[0].id == "new"
    client.delete("toys", ["new"])
    close(client.embed_images(["shoe.jpg"])[0], expected["image"])
    try:
        client.embed_texts(["a"], model="none")
    except clipserve.errors.NotThere as error:
        assert error.code == "model_not_found"
assert numpy.isnan(errors_vectors[1]).all() and errors[1].index == 1
assert (cut, refused[1].code) == ({1}, "text_too_long")
""",
    "openai": """
close(vectors, expected["texts"])
close(image, expected["image"])
assert answer.usage.prompt_tokens > 0
import openai
client = openai.OpenAI(base_url=ADDRESS + "/v1", api_key="none", max_retries=0)
assert [model.id for model in client.models.list()] == ["tiny"]
plain = client.embeddings.create(model="tiny", input="a hat", encoding_format="float")
close(plain.data[0].embedding, expected["texts"][1])
try:
    client.embeddings.create(model="text-embedding-3-small", input="a")
    raise SystemExit("no error for an unknown model")
except openai.NotFoundError as error:
    assert error.code == "model_not_found", error.code
try:
    client.embeddings.create(model="tiny", input=["a", ""])
    raise SystemExit("no error for an empty text")
except openai.BadRequestError as error:
    assert error.param == "input[1]", error.param
""",
    "LangChain OpenAIEmbeddings": """
import asyncio
close(vectors, expected["texts"])
close(query, expected["texts"][0])
close(asyncio.run(embeddings.aembed_documents(["a hat"]))[0], expected["texts"][1])
"""
    + NOT_CLIPS_TOKENS
    + """
import openai
try:
    OpenAIEmbeddings(model="tiny", base_url=ADDRESS + "/v1", api_key="none").embed_query("a hat")
    raise SystemExit("token ids were accepted")
except openai.BadRequestError as error:
    assert "check_embedding_ctx_length=False" in str(error), error
""",
    "LangChain InfinityEmbeddings": """
import asyncio
close(vectors, expected["texts"])
close(query, expected["texts"][0])
close(asyncio.run(embeddings.aembed_documents(["a hat"]))[0], expected["texts"][1])
many = embeddings.embed_documents([f"text {i}" for i in range(300)])
assert len(many) == 300
root = InfinityEmbeddings(model="tiny", infinity_api_url=ADDRESS)
close(root.embed_query("a hat"), expected["texts"][1])
""",
    "LlamaIndex OpenAILikeEmbedding": """
close(vectors, expected["texts"])
close(query, expected["texts"][0])
""",
    "cohere": """
close(vectors, expected["texts"])
close(image, expected["image"])
bits = numpy.packbits(expected["texts"] > 0, axis=1)
assert numpy.array_equal(answer.embeddings.ubinary, bits)
assert (ranked.results[0].index, len(ranked.results)) == (1, 1)
old = cohere.Client(api_key="none", base_url=ADDRESS)
found = old.rerank(
    model="tiny", query="a hat", documents=["a red shoe", "a hat"], return_documents=True
)
assert found.results[0].document.text == "a hat"
try:
    client.embed(model="none", texts=["a"], input_type="search_query")
    raise SystemExit("no error for an unknown model")
except cohere.NotFoundError as error:
    assert error.body["error"]["code"] == "model_not_found"
""",
    "infinity_client": """
assert served.data[0].id == "tiny" and served.data[0].stats["queue_absolute"] == 0
close(vectors, expected["texts"])
assert [one.index for one in ranked.results] == [1, 0]
assert len(images) == 1 and images[0].shape == (1, len(vectors[0]))
assert float(images[0][0] @ expected["image"]) > 0.99  # it makes a JPEG anew
from infinity_client.api.default import health
with Client(base_url=ADDRESS) as client:
    assert health.sync(client=client)["unix"] > 0
""",
    "Jina's API": """
close([one["embedding"] for one in answer["data"]], [expected["texts"][0], expected["image"]])
scores = {one["index"]: one["relevance_score"] for one in ranked}
texts = expected["texts"]
close([scores[0], scores[1]], [texts[0] @ expected["image"], texts[0] @ texts[1]])
""",
    "clip-client": """
close(vectors, [expected["texts"][0], expected["image"]])
matches = ranked[0].matches
scores = [match.scores["clip_score"].value for match in matches]
assert scores == sorted(scores, reverse=True) and abs(sum(scores) - 1) < 1e-4
assert sorted(match.text for match in matches) == ["a hat", "a shoe"]
import asyncio
async def encode():
    return await Client(ADDRESS).aencode(["a hat"])
close(asyncio.run(encode())[0], expected["texts"][1])
many = client.encode([f"text {i}" for i in range(30)], batch_size=4)
assert many.shape == (30, len(expected["image"]))
try:
    client.encode([Document(blob=b"no picture", mime_type="image/png")])
    raise SystemExit("no error for a bad picture")
except Exception as error:
    assert "invalid_image" in str(error), error
""",
    "clip-retrieval": """
assert 1 <= len(by_text) <= 3 and sorted(by_text[0]) == [
    "caption", "id", "image", "n", "similarity", "url"
]
assert by_image[0]["id"] == "toy/3" and by_image[0]["similarity"] > 0.98
found = client.query(embedding_input=expected["image"].tolist())
assert found[0]["id"] == by_image[0]["id"]
""",
    "text-embeddings-inference": """
close(vectors, expected["texts"])
assert [one["index"] for one in ranked] == [1, 0]
""",
    "vLLM's chat embeddings": """
close(vector, expected["image"])
""",
    "Weaviate": """
close(texts, expected["texts"])
close(images, [expected["image"]])
assert httpx.get(ADDRESS + "/.well-known/ready").status_code == 204
""",
}
PACKAGES = {
    "clipserve": "clipserve",
    "openai": "openai",
    "LangChain OpenAIEmbeddings": "langchain_openai",
    "LangChain InfinityEmbeddings": "langchain_community",
    "LlamaIndex OpenAILikeEmbedding": "llama_index.embeddings.openai_like",
    "cohere": "cohere",
    "infinity_client": "infinity_client",
    "Jina's API": "httpx",
    "clip-client": "clip_client",
    "clip-retrieval": "clip_retrieval",
    "text-embeddings-inference": "httpx",
    "vLLM's chat embeddings": "httpx",
    "Weaviate": "httpx",
}
ELSEWHERE = ("infinity_client", "clip-client", "clip-retrieval")

PRELUDE = """
import numpy
expected = numpy.load("expected.npz")
def close(got, wanted):
    numpy.testing.assert_allclose(got, wanted, atol=1e-5)
"""


def sections() -> dict[str, str]:
    """The code of each section of the page, its blocks one after the other."""
    found = {}
    for section in PAGE.read_text().split("\n## ")[1:]:
        title, _, text = section.partition("\n")
        found[title] = "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Iterator[tuple[Path, str]]:
    """A folder with what the examples read and should get, and the service's address."""
    folder = tmp_path_factory.mktemp("clients")
    settings = {"collections_root": folder, "jobs_dir": folder / "jobs"}
    with listening(folder, model_dir, **settings) as (address, model, _):
        (folder / "shoe.jpg").write_bytes(encode(make_picture(seed=3), "JPEG", quality=95))
        (folder / "broken.jpg").write_bytes(b"not a picture")
        np.savez(
            folder / "expected.npz",
            texts=model.embed_texts(["a red shoe", "a hat"]),
            image=model.embed_images([folder / "shoe.jpg"])[0],
        )
        yield folder, address


def test_every_section_is_run_and_checked():
    assert sorted(sections()) == sorted(CHECKS) == sorted(PACKAGES)
    assert all(sections().values())


@pytest.mark.parametrize("title", sorted(CHECKS))
def test_the_quick_start_works(title: str, place: tuple[Path, str]):
    folder, address = place
    python = OTHER_PYTHON if title in ELSEWHERE else Path(sys.executable)
    _skip_without(python, PACKAGES[title])
    shown = sections()[title].replace('"fashion"', '"tiny"').replace('"shoes"', '"toys"')
    assert "http://127.0.0.1:8000" in shown
    shown = shown.replace("print(vectors[1]", "errors_vectors = vectors\nprint(vectors[1]")
    code = [SETUPS.get(title, ""), shown, PRELUDE, f'ADDRESS = "{address}"', CHECKS[title]]
    script = folder / "quick_start.py"
    script.write_text("\n".join(code).replace("http://127.0.0.1:8000", address))
    environment = {
        "PATH": "",
        "HOME": str(folder),
        "PYTHONPATH": str(ROOT) if python == Path(sys.executable) else "",
        "NO_VERSION_CHECK": "1",  # clip_client's and jina's, which would ask the internet
        "JINA_HIDE_SURVEY": "1",
        "JINA_OPTOUT_TELEMETRY": "1",
    }
    done = subprocess.run(
        [python, script], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]


def _skip_without(python: Path, package: str) -> None:
    if not python.exists():
        pytest.skip(f"{package} is not installed: make clients")
    code = (
        f"import sys, importlib.util as u; sys.exit(u.find_spec({package.split('.')[0]!r}) is None)"
    )
    if subprocess.run([python, "-c", code]).returncode:
        pytest.skip(f"{package} is not installed: make clients, or the extra `clients`")
