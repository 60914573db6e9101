"""Where the peers of service.py are installed: an environment for each, below build/service.

clip-server 0.8.3 is of 2023 and pip cannot resolve it any more: service_clip_server.txt names all
it imports but torch and what comes with it. Those gigabytes it sees in Infinity's environment,
behind its own packages.
"""

import json
import subprocess
import venv
from collections.abc import Sequence
from pathlib import Path

INFINITY = ["infinity-emb[torch,server]==0.0.78", "torchvision", "aiohttp", "pillow"]
CLIP_SERVER = Path(__file__).with_name("service_clip_server.txt")


def install(infinity: Path, clip_server: Path) -> None:
    _install(infinity, INFINITY)
    _install(clip_server, ["--no-deps", "--requirement", str(CLIP_SERVER)])
    (own,) = clip_server.glob("lib/python*/site-packages")
    (shared,) = infinity.resolve().glob("lib/python*/site-packages")
    (own / "infinity.pth").write_text(f"{shared}\n")


def is_installed(environment: Path) -> bool:
    return (environment / "bin/python").exists()


def versions(environment: Path, packages: Sequence[str]) -> dict[str, str]:
    """Of packages in another environment."""
    code = (
        "import importlib.metadata as m, json, sys;"
        "print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))"
    )
    done = subprocess.run(
        [environment / "bin/python", "-c", code, *packages], capture_output=True, check=True
    )
    found: dict[str, str] = json.loads(done.stdout)
    return found


def _install(folder: Path, arguments: Sequence[str]) -> None:
    venv.create(folder, with_pip=True)
    subprocess.run(
        [folder / "bin/python", "-m", "pip", "install", "--quiet", *arguments], check=True
    )
