"""Tars for tests: what they hold, and where in them it lies."""

import io
import json
import tarfile
from dataclasses import dataclass
from pathlib import Path

from conftest import encode, make_picture

FASHION = Path(__file__).parents[2] / "shared" / "data" / "fashion" / "train-00000.tar"

Members = list[tuple[str, bytes]]


@dataclass(frozen=True)
class Extent:
    """Where a member lies in its tar: from its (extended) header on, its data, to its padding."""

    name: str
    start: int
    data: int
    data_end: int
    end: int

    @property
    def key(self) -> str:
        return self.name.rpartition(".")[0]


def twenty_samples() -> Members:
    """jpg, txt, json of 20 samples: real ones where they are there."""
    if FASHION.is_file():
        with tarfile.open(FASHION) as tar:
            members = [(info.name, tar.extractfile(info)) for info in list(tar)[:60]]
            return [(name, file.read()) for name, file in members if file]
    return [
        member
        for i in range(20)
        for member in (
            (f"{i:06d}.jpg", encode(make_picture(seed=i), "JPEG")),
            (f"{i:06d}.txt", f"picture number {i}".encode()),
            (f"{i:06d}.json", json.dumps({"n": i}).encode()),
        )
    ]


def to_tar(members: Members, format: int = tarfile.USTAR_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def extents(tar_bytes: bytes) -> list[Extent]:
    with tarfile.open(fileobj=io.BytesIO(tar_bytes)) as tar:
        infos = list(tar)
    ends = [info.offset_data + -(-info.size // 512) * 512 for info in infos]
    return [
        Extent(info.name, info.offset, info.offset_data, info.offset_data + info.size, end)
        for info, end in zip(infos, ends, strict=True)
    ]


def write_tar(path: Path, members: Members, format: int = tarfile.USTAR_FORMAT) -> Path:
    path.write_bytes(to_tar(members, format))
    return path


def samples(count: int, start: int = 0) -> Members:
    """jpg, txt and json of samples that are quick to make; the pictures are none."""
    return [
        member
        for i in range(start, start + count)
        for member in (
            (f"{i:04d}.jpg", b"J" * (100 + i)),
            (f"{i:04d}.txt", f"caption {i}".encode()),
            (f"{i:04d}.json", json.dumps({"n": i}).encode()),
        )
    ]
