"""The blocks of docs/finetune.md, run in order as they stand, beside the data that they name."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "finetune.md"
SHARED = ROOT.parent / "shared"
# A curl that fails where the service refuses, and goes through no proxy; no server stays behind.
PROLOGUE = """set -e -x -o pipefail
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
curl() { command curl --fail-with-body -S --noproxy '*' "$@"; }
"""


def shown_script() -> str:
    """All commands of the page; a TOML block is the file that its first line names."""
    parts = []
    for language, block in re.findall(r"```(bash|toml)\n(.*?)```", PAGE.read_text(), re.DOTALL):
        if language == "toml":
            file = block.split("\n")[0].removeprefix("# ")
            block = f"cat > {file} <<'END'\n{block}END\n"
        parts.append(block)
    return "".join(parts)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def mean_r10(row: dict[str, list[dict[str, float]]]) -> list[float]:
    return [recall["mean_r10"] for recall in row["recall"]]


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="../shared/data is not here")
def test_the_page_runs_from_a_pretrained_model_to_a_service(tmp_path: Path) -> None:
    checkout, port = tmp_path / "checkout", free_port()
    checkout.mkdir()
    (tmp_path / "shared").symlink_to(SHARED.resolve())
    script = PROLOGUE + shown_script().replace("localhost:8000", f"localhost:{port}") + "wait\n"
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PATH": path, "CLIPSERVE_PORT": str(port)}
    done = subprocess.run(
        ["bash", "-c", script], cwd=checkout, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    first, *_, last = map(mean_r10, json.loads((checkout / "runs/sweep.json").read_text())["rows"])
    assert last[1] > first[1] + 0.02, "nothing was learnt of the new task"
    assert first[0] > 0.05, "nothing was known of the old one"
    assert (checkout / "weights/aerial/open_clip_config.json").is_file()


def test_the_page_s_commands_are_all_in_the_script() -> None:
    script = shown_script()
    assert script.count("clipserve train") >= 8
    assert "cat > tune.toml <<'END'" in script
    assert "localhost:8000" in script
