"""Commands under `clipserve index`: what is done to a collection as a whole."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clipserve.cli.options import CollectionDir, Device, Dtype, Field, Json, load_for
from clipserve.console import fail, print_json, print_line, print_table
from clipserve.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np

    from clipserve.model import Model
    from index.collection import Collection
    from index.info import IndexInfo

_SEED = 0


def build(
    collection: CollectionDir,
    kind: Annotated[
        str, typer.Option(help="auto, exact, ivf, hnsw, or as FAISS names it: IVF4096,SQ8.")
    ] = "auto",
    field: Field = "image",
    model: Annotated[
        str, typer.Option(help="Model directory; tunes with captions of the collection as queries.")
    ] = "",
    recall: Annotated[
        float, typer.Option(help="Part of the true best that must be found, 0.5 to 1.")
    ] = 0.95,
    memory: Annotated[
        float | None, typer.Option(help="GiB that the index may take; else half of what is free.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Else one for each core.")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Build the search index of a collection: as its size and the memory allow, tuned to a recall.

    Searches and writes go on meanwhile; the new index takes the old one's place when it is ready.
    """
    if not 0.5 <= recall <= 1:
        raise ConfigError(f"--recall {recall:g} is not allowed; give a number from 0.5 to 1")
    if memory is not None and not 0 < memory < math.inf:
        raise ConfigError(f"--memory {memory:g} is not allowed; give a number of GiB above 0")
    from index.build import build as build_index
    from index.collection import Collection

    with Collection.open(collection) as opened:
        queries = None
        if model:
            queries = _caption_vectors(opened, field, load_for(collection, model, device, dtype))
        built = build_index(
            opened,
            kind=kind,
            field=field,
            queries=queries,
            recall_target=recall,
            memory_bytes=None if memory is None else int(memory * 2**30),
            threads=threads,
        )
    print_json(_describe(built)) if as_json else print_line(
        f"{built.kind}, {built.count} vectors: {built.reason}"
    )


def info(collection: CollectionDir, as_json: Json = False) -> None:
    """What a collection holds, how it is searched, and what its index was measured to find."""
    from index.cache import read_info
    from index.collection import FIELDS, Collection

    with Collection.open(collection, read_only=True) as opened:
        facts: dict[str, Any] = {
            "collection": opened.name,
            "items": opened.count(),
            "model": opened.model_name,
            "fingerprint": opened.fingerprint,
            "embed_dim": opened.embed_dim,
            "vectors": opened.dtype.name,
        }
        with opened.snapshot():
            rows = {field: opened.rowids(field) for field in FIELDS}
            built = {field: read_info(collection, field) for field in FIELDS}
    if as_json:
        counts = {field: len(own) for field, own in rows.items()}
        indexes = {field: _describe(one) for field, one in built.items() if one}
        print_json(facts | {"counts": counts, "indexes": indexes})
        return
    for key, value in facts.items():
        print_line(f"{key}: {value}")
    for field, own in rows.items():
        _print_index(field, own, built[field])


def _describe(built: "IndexInfo") -> dict[str, Any]:
    sizes = {"size_bytes": built.size_bytes, "bytes_per_vector": built.bytes_per_vector}
    return vars(built) | sizes


def _print_index(field: str, rowids: "np.ndarray", built: "IndexInfo | None") -> None:
    """What the index of a field is, beside the rows (N,) that are alive now."""
    if built is None:
        if len(rowids):
            print_line(f"{field}: {len(rowids):,} vectors, no index; all of them are compared")
        return
    fresh = int((rowids > built.max_rowid).sum())
    dead = built.count - (len(rowids) - fresh)
    print_line(
        f"{field}: {len(rowids):,} vectors; index {built.kind} of {built.count:,}; since then"
        f" {fresh:,} written, {dead:,} deleted"
    )
    print_line(
        f"  {built.size_bytes / 2**20:,.1f} MiB on disk, {built.bytes_per_vector:,.0f} bytes of"
        f" memory a vector, built in {built.seconds:,.1f} s"
    )
    print_line(f"  {built.reason}")
    if built.curve:
        _print_curve(built)


def _print_curve(built: "IndexInfo") -> None:
    """Every measured setting; the ones in use have a star."""
    print_line(f"  recall target {built.recall_target:g}, measured with {built.queries}:")
    rows = [["", "k", "breadth", "fetch", "recall", "ms a query"]]
    for point in sorted(built.curve, key=lambda point: (point["k"], point["breadth"])):
        rows.append(
            [
                "*" if point == built.tuned.get(point["k"]) else "",
                str(point["k"]),
                str(point["breadth"]),
                str(point["fetch"]),
                f"{point['recall']:.3f}",
                f"{point['ms']:.3f}",
            ]
        )
    print_table(rows)
    for selectivity, factor in sorted(built.filtered.items(), reverse=True):
        print_line(f"  a filter that lets {selectivity:.0%} through: {factor:g} times the breadth")


def check(
    collection: CollectionDir,
    no_write: Annotated[
        bool, typer.Option("--no-write", help="Change nothing, not even what can be mended.")
    ] = False,
    accept_loss: Annotated[
        bool,
        typer.Option("--accept-loss", help="Go on without acknowledged writes that are missing."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Read every byte of a collection, and name what is damaged.

    A damaged index is built again, as it was asked for. Exit code 1 if something stays damaged.
    """
    from index.check import check as check_all

    if no_write and accept_loss:
        raise ConfigError("--accept-loss changes the collection; leave --no-write out")
    report = check_all(collection, repair=not no_write, accept_loss=accept_loss)
    if as_json:
        print_json(vars(report))
    else:
        for line in report.repaired:
            print_line(f"mended: {line}")
        for line in report.problems:
            print_line(f"bad: {line}")
        print_line(f"{report.items} items, {len(report.problems)} problems")
    if report.problems:
        fail(f"{collection} is damaged, {len(report.problems)} problems; see the list", code=1)


def compact(collection: CollectionDir, as_json: Json = False) -> None:
    """Give the space of deleted and replaced items back to the disk; searches go on meanwhile."""
    from index.upkeep import compact as compact_database

    report = compact_database(collection)
    if as_json:
        print_json(vars(report))
    else:
        before, after = report.before / 2**20, report.after / 2**20
        print_line(f"{collection}: {before:,.1f} MiB before, {after:,.1f} MiB now")


def snapshot(
    collection: CollectionDir,
    out: Annotated[Path, typer.Argument(help="New directory for the copy.")],
    as_json: Json = False,
) -> None:
    """Copy a collection as it is at one moment, without its index; writes go on meanwhile.

    The copy is a collection of its own.
    """
    from index.upkeep import snapshot as copy

    copy(collection, out)
    print_json({"out": str(out)}) if as_json else print_line(f"written: {out}")


def _caption_vectors(collection: "Collection", field: str, model: "Model") -> "np.ndarray":
    """Text queries (Q, E) float32 as people may ask them: distinct captions, drawn at random."""
    import numpy as np

    from index.tune import MAX_QUERIES

    with collection.snapshot():
        drawn = np.random.default_rng(_SEED).permutation(collection.rowids(field))[:MAX_QUERIES]
        items = collection.items_of(drawn)
    captions = [items[rowid].caption.split(" | ")[0].strip() for rowid in drawn.tolist()]
    distinct = [caption for caption in dict.fromkeys(captions) if caption]
    if not distinct:
        raise ConfigError(
            f"collection {collection.name!r} has no captions to tune with; leave --model out"
        )
    return model.embed_texts(distinct)
