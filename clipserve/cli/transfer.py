"""Commands that take a collection to other programs and back: index export, index import."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clipserve.cli.options import CollectionDir, Json, pick
from clipserve.console import Counter, print_json, print_line
from clipserve.errors import ConfigError

if TYPE_CHECKING:
    from index.collection import Collection

_FORMATS = ("npy", "parquet", "faiss")


def export(
    collection: CollectionDir,
    out: Annotated[Path, typer.Argument(help="New file (parquet) or folder (npy, faiss).")],
    to: Annotated[
        str, typer.Option(help="npy: as clip-retrieval lays it out; parquet; or faiss, the index.")
    ],
    field: Annotated[
        str | None, typer.Option(help="Only these vectors, image or text; faiss: else image.")
    ] = None,
    vectors: Annotated[
        str | None, typer.Option(help="npy: float16 or float32; else as they are stored.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write the items and vectors of a collection as other programs read them."""
    from index.collection import Collection
    from index.transfer import export_faiss, export_npy, export_parquet

    form = pick(to, _FORMATS, "--to")
    if vectors is not None and form != "npy":
        raise ConfigError(f"--vectors {vectors} is for --to npy; leave it out")
    if field is not None and form == "parquet":
        raise ConfigError(f"--field {field} is for npy and faiss; parquet has all vectors")
    with Collection.open(collection, read_only=True) as opened, Counter("exporting") as counter:
        if form == "npy":
            fields = None if field is None else [field]
            count = export_npy(opened, out, fields=fields, dtype=vectors, progress=counter.update)
        elif form == "parquet":
            count = export_parquet(opened, out, progress=counter.update)
        else:
            count = export_faiss(opened, out, field=field or "image")
    if as_json:
        print_json({"out": str(out), "items": count})
    else:
        print_line(f"written: {out}, {count} items")


def import_vectors(
    source: Annotated[
        Path,
        typer.Argument(help="Folder of clip-retrieval's, .parquet file or folder, .faiss file."),
    ],
    collection: Annotated[Path, typer.Argument(help="Collection directory, made if missing.")],
    model: Annotated[
        str, typer.Option(help="Model directory, needed for a new one: what made the vectors.")
    ] = "",
    vectors: Annotated[
        str | None, typer.Option(help="float32 or float16, for a new one; else float32.")
    ] = None,
    id_column: Annotated[
        str | None, typer.Option(help="Column with unique ids; else id, image_path or key.")
    ] = None,
    image_vectors: Annotated[
        str | None, typer.Option(help="parquet: column with a picture's vector; else image_vector.")
    ] = None,
    text_vectors: Annotated[
        str | None, typer.Option(help="parquet: column with a caption's vector; else text_vector.")
    ] = None,
    ids: Annotated[
        Path | None, typer.Option(help="faiss: Parquet file of the items; else ids.parquet there.")
    ] = None,
    field: Annotated[
        str | None, typer.Option(help="faiss: what the vectors are of, text or else image.")
    ] = None,
    normalize: Annotated[
        bool, typer.Option("--normalize", help="Scale vectors to unit length; else refuse others.")
    ] = False,
    lossy: Annotated[
        bool, typer.Option("--lossy", help="faiss: take vectors that the index keeps rounded.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Add items and vectors of other programs; what they bring replaces what is there."""
    from index import transfer

    form = _format_of(source)
    for option, value, only in (
        ("--image-vectors", image_vectors, "parquet"),
        ("--text-vectors", text_vectors, "parquet"),
        ("--ids", ids, "faiss"),
        ("--field", field, "faiss"),
        ("--lossy", lossy or None, "faiss"),
    ):
        if value is not None and form != only:
            raise ConfigError(f"{option} is for {only}, and {source} is {form}; leave it out")
    named = {"image": image_vectors, "text": text_vectors}
    columns = {field: column for field, column in named.items() if column is not None}
    with _open_for(collection, model, vectors) as opened, Counter("importing") as counter:
        if form == "npy":
            count = transfer.import_npy(
                source, opened, id_column=id_column, normalize=normalize, progress=counter.update
            )
        elif form == "parquet":
            count = transfer.import_parquet(
                source,
                opened,
                id_column=id_column,
                vector_columns=columns or transfer.VECTOR_COLUMNS,
                normalize=normalize,
                progress=counter.update,
            )
        else:
            file = source / transfer.FAISS_FILE if source.is_dir() else source
            count = transfer.import_faiss(
                file,
                ids or file.with_name(transfer.FAISS_IDS),
                opened,
                field=field or "image",
                id_column=id_column,
                normalize=normalize,
                lossy=lossy,
                progress=counter.update,
            )
    if as_json:
        print_json({"collection": str(collection), "items": count})
    else:
        print_line(f"imported {count} items into {collection}")


def _format_of(source: Path) -> str:
    from index.transfer import FAISS_FILE

    if not source.exists():
        raise ConfigError(f"source {source} does not exist")
    if (source / "metadata").is_dir():
        return "npy"
    if source.suffix == ".faiss" or (source / FAISS_FILE).is_file():
        return "faiss"
    if source.suffix == ".parquet" or (source.is_dir() and any(source.glob("*.parquet"))):
        return "parquet"
    raise ConfigError(
        f"source {source} is of no known form; give a folder with metadata/ and img_emb/, a"
        f" .parquet file or a folder of them, a .faiss file, or a folder with {FAISS_FILE}"
    )


@contextlib.contextmanager
def _open_for(path: Path, model: str, dtype: str | None) -> Iterator["Collection"]:
    """The collection. One that is missing is made for that model, and appears when it is filled."""
    from clipserve.checkpoint import read_description
    from clipserve.files import new_directory
    from index.collection import DATABASE, Collection

    is_there = (path / DATABASE).is_file()
    if not is_there and not model:
        raise ConfigError(
            f"{path} is no collection yet; --model MODEL, which made the vectors, is required"
        )
    if not is_there and path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(f"{path} is there, and is no collection; choose a new directory")
    if not model:
        if dtype is not None:
            raise ConfigError(f"--vectors {dtype} is for a collection made now; leave it out")
        with Collection.open(path) as opened:
            yield opened
        return
    description = read_description(Path(model))
    place = (
        contextlib.nullcontext(path) if is_there else new_directory(path.absolute(), replace=False)
    )
    with (
        place as folder,
        Collection.open_or_create(
            folder,
            fingerprint=description["fingerprint"],
            model_name=description["name"],
            embed_dim=description["architecture"]["embed_dim"],
            dtype=dtype,
        ) as opened,
    ):
        yield opened
