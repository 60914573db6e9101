"""Which index: from the number of vectors, their dimension and the memory there is; and why.

Start at `choose`.

Legend: N vectors, E embedding.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path

from clipserve.errors import ConfigError

EXACT_LIMIT = 200_000
"""vectors up to which each is compared: 0.2 GB at E = 512, 25 ms a query on two cores with AMX"""

_IVF = re.compile(r"IVF([1-9]\d{0,6}),(Flat|SQfp16|SQ8|RaBitQ[2-8]?|PQ([1-9]\d{0,3})x4fs)")
_HNSW = re.compile(r"HNSW([1-9]\d{0,2}),(Flat|SQ8)")
_GRAPHS = ("HNSW32,Flat", "HNSW32,SQ8")
"""the faster one, twice as fast to build and to search, and the one of a third of its size"""
_GPU_FILLED = 0.8
"""of a GPU's free memory that the vectors may take"""


@dataclass(frozen=True)
class Choice:
    """An index to build."""

    kind: str
    """ "exact", or FAISS's name of it"""
    reason: str
    memory_bytes: int
    """that it is expected to take"""


def choose(
    kind: str,
    count: int,
    embed_dim: int,
    *,
    exact_limit: int = EXACT_LIMIT,
    memory_bytes: int | None = None,
) -> Choice:
    """The index to build of N vectors, and why.

    kind: "auto", "exact", "ivf", "hnsw", or as FAISS names it: IVF<lists>,<SQ8|SQfp16|Flat|RaBitQ|
    RaBitQ2..8|PQ<m>x4fs> or HNSW<links>,<SQ8|Flat>. memory_bytes: that it may take, beside the
    vectors on disk; else half of what is free. ConfigError if there is no such index, or it does
    not fit.
    """
    budget = available_memory() // 2 if memory_bytes is None else memory_bytes
    if kind == "auto":
        return _automatic(count, embed_dim, exact_limit, budget)
    if kind == "exact":
        return Choice(kind, "asked for; each is compared with the query", _exact(count, embed_dim))
    named = {"ivf": f"IVF{_lists(count)},SQ8", "hnsw": _GRAPHS[0]}.get(kind, kind)
    if kind == "hnsw" and memory_needed(named, count, embed_dim) > budget:
        named = _GRAPHS[1]
    needed = memory_needed(named, count, embed_dim)
    if not count:
        return Choice("exact", "there are no vectors yet", 0)
    if memory_bytes is not None and needed > memory_bytes:
        raise ConfigError(
            f"{named} of {count} vectors takes {_size(needed)}, more than the"
            f" {_size(memory_bytes)} allowed; allow more, or use kind auto"
        )
    return Choice(named, f"asked for{_explain(named)}", needed)


def memory_needed(kind: str, count: int, embed_dim: int) -> int:
    """Bytes that an index takes, within some percent. ConfigError for one that cannot be built."""
    if kind == "exact":
        return _exact(count, embed_dim)
    if found := _IVF.fullmatch(kind):
        lists, codes = int(found[1]), found[2]
        if lists > max(count, 1):
            raise ConfigError(f"{kind} has more lists than the {count} vectors; use kind exact")
        if found[3] and (int(found[3]) % 2 or embed_dim % int(found[3])):
            raise ConfigError(f"{kind}: {found[3]} must be even and divide {embed_dim}")
        # Codes for fast scans stand in blocks of 32 vectors.
        padded, codebook = (count + 16 * lists, embed_dim * 64) if found[3] else (count, 0)
        codes_bytes = padded * _code_bytes(codes, embed_dim) + codebook
        return codes_bytes + count * 8 + lists * (embed_dim * 4 + 64)
    if found := _HNSW.fullmatch(kind):
        links = int(found[1])
        if links < 2:
            raise ConfigError(f"{kind}: a graph needs at least 2 links a vector")
        return count * (_code_bytes(found[2], embed_dim) + links * 9 + 16)
    raise ConfigError(
        f"unknown index kind {kind!r}; use auto, exact, ivf, hnsw,"
        " IVF<lists>,<SQ8|SQfp16|Flat|RaBitQ|RaBitQ2..8|PQ<m>x4fs> or HNSW<links>,<SQ8|Flat>"
    )


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that can be had without swapping, inside the process's control group."""
    found = re.search(r"^MemAvailable:\s+(\d+) kB", _read(root / "proc/meminfo"), re.MULTILINE)
    free = int(found[1]) * 1024 if found else 2**62
    group = root / "sys/fs/cgroup"
    own = re.search(r"^0::/(.*)$", _read(root / "proc/self/cgroup"), re.MULTILINE)
    folders = [group / own[1], *(group / own[1]).parents] if own else [group]
    for folder in folders:
        if not folder.is_relative_to(group):
            break
        for most, used in (
            ("memory.max", "memory.current"),
            ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
        ):
            limit, now = _read(folder / most).strip(), _read(folder / used).strip()
            if limit.isdecimal() and now.isdecimal():
                free = min(free, max(0, int(limit) - int(now)))
    return free


def gpu_room() -> int:
    """Bytes that vectors may take on the first GPU that torch sees; 0 without one."""
    import torch

    if not torch.cuda.is_available():
        return 0
    free: int = torch.cuda.mem_get_info(0)[0]
    return int(_GPU_FILLED * free)


def _automatic(count: int, embed_dim: int, exact_limit: int, budget: int) -> Choice:
    exact = _exact(count, embed_dim)
    if count <= exact_limit and exact <= budget:
        why = f"{count:,} vectors are at most {exact_limit:,}: comparing each with the query"
        return Choice("exact", f"{why} is fast and misses none", exact)
    if exact <= gpu_room():
        why = f"{count:,} vectors take {_size(exact)} and fit on the GPU, which compares them all"
        return Choice("exact", f"{why} and misses none", exact)
    refused = ""
    for codes in _automatic_codes(embed_dim):
        kind = f"IVF{_lists(count)},{codes}"
        needed = memory_needed(kind, count, embed_dim)
        if needed <= budget:
            why = f"{count:,} vectors (more than {exact_limit:,}){refused}; {_size(needed)} of the"
            return Choice(kind, f"{why} {_size(budget)} it may take{_explain(kind)}", needed)
        refused += f", {codes} would take {_size(needed)}"
    raise ConfigError(
        f"no index of {count} vectors fits into {_size(budget)}{refused}; allow more memory, or use"
        " kind exact, which reads the vectors from disk"
    )


def _automatic_codes(embed_dim: int) -> list[str]:
    """From the fastest to the smallest.

    200,000 clustered vectors of E = 512, queries of another distribution, milliseconds a query at
    recall@10 0.95 and 0.98 and recall@100 0.95, exact scores of the candidates included (2-core
    Xeon, one after the other in turns): SQ8 0.11, 0.16, 1.0 with 541 bytes a vector; PQ128x4fs
    0.14, 0.25, 1.2 with 103; RaBitQ 0.14, 0.26, 2.6 with 101; PQ64x4fs 0.20, 0.42, 10.8 with 66.
    """
    fine = f"PQ{embed_dim // 4}x4fs" if embed_dim % 8 == 0 else "RaBitQ"
    return ["SQ8", fine] + ([f"PQ{embed_dim // 8}x4fs"] if embed_dim % 16 == 0 else [])


def _explain(kind: str) -> str:
    codes = kind.partition(",")[2]
    bits = {
        "Flat": "four bytes a dimension",
        "SQfp16": "two bytes a dimension",
        "SQ8": "one byte a dimension",
        "RaBitQ": "one bit a dimension",
    }.get(codes)
    if codes.startswith("PQ"):
        bits = f"{codes[2:].partition('x')[0]} times four bits"
    bits = bits or f"{codes[-1]} bits a dimension"
    lists = kind.partition(",")[0]
    shape = f"{lists[3:]} lists" if lists.startswith("IVF") else f"{lists[4:]} links a vector"
    return f"; {shape}, {bits}, the best candidates scored again exactly"


def _lists(count: int) -> int:
    """As many lists as autofaiss takes below a million vectors."""
    return min(1 << round(math.log2(4 * math.sqrt(max(count, 1)))), max(count, 1))


def _code_bytes(codes: str, embed_dim: int) -> int:
    if codes.startswith("RaBitQ"):
        bits = int(codes[6:] or 1)
        # A bit of each dimension and two factors; the further bits have factors of their own.
        return math.ceil(embed_dim * bits / 8) + (8 if bits == 1 else 20)
    if codes.startswith("PQ"):
        return int(codes[2:].partition("x")[0]) // 2
    bytes_a_dimension = {"Flat": 4, "SQfp16": 2, "SQ8": 1}
    return embed_dim * bytes_a_dimension[codes]


def _exact(count: int, embed_dim: int) -> int:
    """In half precision."""
    return count * embed_dim * 2


def _size(num_bytes: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes / 2**10:.1f} KiB"


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError:
        return ""
