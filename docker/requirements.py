"""pyproject.toml's requirements as files for pip: build.txt, base.txt, and one for each extra.

An image installs them before it gets the source, so that a change of the source leaves their layer.
"""

import tomllib
from pathlib import Path


def main() -> None:
    table = tomllib.loads(Path("pyproject.toml").read_text())
    project = table["project"]
    folder = Path("requirements")
    folder.mkdir()
    lists = {"build": table["build-system"]["requires"], "base": project["dependencies"]}
    for name, lines in (lists | project["optional-dependencies"]).items():
        (folder / f"{name}.txt").write_text("".join(f"{line}\n" for line in lines))
    (folder / "constraints.txt").write_text(Path("constraints.txt").read_text())


if __name__ == "__main__":
    main()
