"""The command that fills a collection: embed."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clipserve.cli.options import Device, Dtype, Json, ModelDir, with_source_options
from clipserve.console import Counter, fail, print_json, print_line

if TYPE_CHECKING:
    from clipserve.sources import SourceOptions


@with_source_options
def embed(
    model: ModelDir,
    source: Annotated[
        str, typer.Argument(help="Shards, a table, a folder of pictures, or hf:NAME.")
    ],
    collection: Annotated[Path, typer.Option(help="Collection directory to fill.")],
    options: "SourceOptions",
    text: Annotated[
        bool, typer.Option("--text", help="Embed each picture's first caption, too.")
    ] = False,
    vectors: Annotated[
        str | None,
        typer.Option(help="float32 or float16, half as large; else as there, or float32."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    overwrite: Annotated[
        bool, typer.Option(help="Embed everything again, deleted items too.")
    ] = False,
    max_bad_fraction: Annotated[
        float, typer.Option(min=0, max=1, help="Exit code 1 when more than this part is bad.")
    ] = 0.1,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Embed pictures into a collection; what is there or was done is skipped: it can be repeated.

    When it was cut short, the same command again goes on where it stopped. An item that was deleted
    since stays away as long as the source is the same.
    """
    from clipserve.checkpoint import load
    from clipserve.sources import first_lines
    from index.embed_corpus import embed_corpus

    loaded = load(model, device, dtype)
    with Counter("embedding") as counter:
        report = embed_corpus(
            loaded,
            source,
            collection,
            options=options,
            batch_size=batch_size,
            overwrite=overwrite,
            with_text=text,
            dtype=vectors,
            progress=counter.update,
        )
    if as_json:
        print_json(
            {
                "added": report.added,
                "skipped": report.skipped,
                "bad": [vars(record) for record in report.bad],
                "bad_by_kind": report.bad_by_kind,
                "texts_cut": report.texts_cut,
                "seconds": round(report.seconds, 3),
            }
        )
    else:
        for line in first_lines(report.bad, report.num_bad):
            print_line(f"bad: {line}")
        rate = report.added / report.seconds if report.seconds else 0.0
        print_line(
            f"added {report.added}, skipped {report.skipped} there or embedded before,"
            f" {report.num_bad} bad; {report.seconds:.1f} s, {rate:.0f} pictures/s"
        )
        if report.texts_cut:
            print_line(f"{report.texts_cut} captions were longer than the model reads, and cut")
    total = report.added + report.skipped + report.num_bad
    if report.num_bad > max_bad_fraction * total:
        fail(
            f"{report.num_bad} of {total} samples are bad, more than --max-bad-fraction"
            f" {max_bad_fraction:.1%}; the good ones are in {collection}",
            code=1,
        )
