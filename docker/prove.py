"""Prove that the images install and start, on a machine where no container engine runs.

    sudo python docker/prove.py service|training [--build-arg VARIANT=gpu] [--work FOLDER]
        [--secret id=pip,src=FILE]

Runs the steps of the Dockerfile itself (`layers`), then what a user would do first, with a
read-only root and no rights (`containers`). Ends with code 0 if all went well. The first build
downloads what an image holds, gigabytes with CUDA's libraries; FOLDER keeps the layers and pip's
cache for the next one. Linux, root, and: apt-get install debootstrap iproute2.
"""

import argparse
import logging
import os
import shutil
import sys
from pathlib import Path

from containers import Container, Engine
from dockerfile import Context
from layers import Builder

logger = logging.getLogger("proof")

ROOT = Path(__file__).parent.parent
_TOOLS = ("debootstrap", "unshare", "nsenter", "chroot", "mount", "ip")
_KEYS = "/run/secrets/clipserve_keys"
_READY_S = 120.0
_STOP_S = 30.0
_MISTAKE = 2
"""the exit code of clipserve for what its user can mend"""

_MAKE_MODEL = """
import pathlib
from clipserve import checkpoint, model
vision = {"image_size": 32, "patch_size": 16, "width": 32, "layers": 1, "head_width": 16}
text = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
table = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
checkpoint.save(model.create(table), pathlib.Path("models/tiny"), name="tiny")
"""
_CLASSIFY = """
import http.client, io, sys
from PIL import Image
picture = io.BytesIO()
Image.new("RGB", (64, 48), "red").save(picture, "PNG")
connection = http.client.HTTPConnection("127.0.0.1", 8000, timeout=30)
headers = {"Content-Type": "image/png", "Authorization": "Bearer " + sys.argv[1]}
connection.request("POST", "/v1/classify?labels=red,green", picture.getvalue(), headers)
answer = connection.getresponse()
print(answer.status, answer.read().decode())
"""
_MAKE_PICTURES = """
import pathlib
from PIL import Image
folder = pathlib.Path("pictures")
folder.mkdir()
lines = ["image,caption"]
for i in range(64):
    Image.new("RGB", (64, 48), (4 * i, 255 - 4 * i, 99)).save(folder / f"{i}.png")
    lines.append(f"{i}.png,colour number {i}")
(folder / "captions.csv").write_text("\\n".join(lines) + "\\n")
"""


def main() -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    arguments = _parse_arguments()
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing or os.geteuid() != 0:
        logger.error("missing here: %s", ", ".join(missing) or "the rights of root")
        return 2
    text = (ROOT / "docker" / f"{arguments.image}.Dockerfile").read_text()
    secrets = {given["id"]: Path(given["src"]) for given in map(_pairs, arguments.secret)}
    wanted = dict(given.split("=", 1) for given in arguments.build_arg)
    builder = Builder(text, Context(ROOT), arguments.work, wanted, secrets)
    root, image = builder.build(arguments.image)
    shutil.rmtree(arguments.work / "volumes", ignore_errors=True)
    engine = Engine(root, image, arguments.work)
    _check("no secret of the build is left", _runs(engine, "test", "!", "-e", "/etc/pip.conf"))
    _check("clipserve doctor", _runs(engine, "clipserve", "doctor"))
    {"service": _prove_service, "training": _prove_training}[arguments.image](engine)
    logger.info("proven: %s", " ".join([arguments.image, *arguments.build_arg]))
    return 0


def _prove_service(engine: Engine) -> None:
    """Starts with keys only; then it is healthy, answers, and ends at SIGTERM."""
    _check("a model is made on the volume", _runs(engine, "python", "-c", _MAKE_MODEL))
    refused = engine.run(["clipserve", "serve", "models/tiny"]).returncode
    _check("0.0.0.0 is refused without keys", refused == _MISTAKE)
    made = engine.run(["clipserve", "keys", "new", "--name", "proof", "--file", "keys"])
    _check("clipserve keys new", made.returncode == 0)
    token = next(word for word in made.stdout.split() if word.startswith("csk_"))
    files = {_KEYS: engine.work / "volumes/data/keys"}
    settings = {"CLIPSERVE_API_KEYS_FILE": _KEYS}
    with engine.start(["serve", "models/tiny"], settings, files) as container:
        seconds = container.wait_until_healthy(_READY_S)
        _check(f"healthy after {seconds:.1f} s", True)
        _check_confinement(container)
        answer = container.execute(["python", "-c", _CLASSIFY, token]).stdout
        _check(f"a picture is classified: {answer.strip()}", answer.startswith("200 "))
        answer = container.execute(["python", "-c", _CLASSIFY, "none"]).stdout
        _check("another key is refused", answer.startswith("401 "))
        _check("SIGTERM ends it with code 0", container.stop(_STOP_S) == 0)
    with engine.start(["serve", "models/tiny"], settings, files) as container:
        seconds = container.wait_until_obedient(_READY_S)
        stopped = container.stop(_STOP_S)
        _check(f"from {seconds:.1f} s after its start SIGTERM ends it with code 0", stopped == 0)


def _prove_training(engine: Engine) -> None:
    """Packs, and trains with compiled towers."""
    _check("pictures are made on the volume", _runs(engine, "python", "-c", _MAKE_PICTURES))
    _check("clipserve pack", _runs(engine, "clipserve", "pack", "pictures/captions.csv", "shards"))
    settings = ["train.steps=2", "train.compile=on", "data.workers=1", "data.batch_size=16"]
    run = ["clipserve", "train", "out=run", "model.preset=tiny", "data.train=shards", *settings]
    _check(" ".join(run), _runs(engine, *run))


def _check_confinement(container: Container) -> None:
    status = container.execute(["cat", "/proc/1/status", "/proc/1/cmdline"]).stdout
    facts = dict(line.partition(":\t")[::2] for line in status.splitlines())
    uid = facts["Uid"].split()[0]
    _check(f"PID 1 is the service, as uid {uid}", uid != "0" and "serve" in status)
    _check("it has no capabilities", int(facts["CapBnd"], 16) == int(facts["CapEff"], 16) == 0)
    refused = container.execute(["touch", "/opt/clipserve/x"]).stderr
    _check("the root is read-only", "Read-only file system" in refused)


def _runs(engine: Engine, *argv: str) -> bool:
    done = engine.run(argv)
    sys.stderr.write(done.stdout)
    return done.returncode == 0


def _check(what: str, is_so: bool) -> None:
    if not is_so:
        raise SystemExit(f"FAILED: {what}")
    logger.info("ok: %s", what)


def _pairs(text: str) -> dict[str, str]:
    return dict(part.partition("=")[::2] for part in text.split(","))


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("image", choices=("service", "training"))
    parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--secret", action="append", default=[], metavar="id=NAME,src=FILE")
    parser.add_argument("--work", type=Path, default=Path("/var/tmp/clipserve-proof"))
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
