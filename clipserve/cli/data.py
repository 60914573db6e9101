"""Commands on sources and shards: pack, verify."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clipserve.cli.options import Json, with_source_options
from clipserve.console import Counter, fail, print_json, print_line
from clipserve.errors import ClipserveError

if TYPE_CHECKING:
    from clipserve.sources import SourceOptions


@with_source_options
def pack(
    source: Annotated[
        str,
        typer.Argument(
            help="A .csv, .tsv, .jsonl, .json or .parquet file, a folder, shards, or hf:NAME."
        ),
    ],
    out: Annotated[Path, typer.Argument(help="New folder for the shards.")],
    options: "SourceOptions",
    val_fraction: Annotated[
        float, typer.Option(min=0, max=0.9, help="Hold this part out, in OUT/val; rest OUT/train.")
    ] = 0.0,
    split_by: Annotated[
        str,
        typer.Option(help="What never straddles the two parts: caption, image, or a column."),
    ] = "caption",
    samples_per_shard: Annotated[int, typer.Option(min=1)] = 5000,
    fetch_threads: Annotated[
        int, typer.Option(min=1, max=1024, help="Pictures fetched at once, for URLs.")
    ] = 32,
    fetch_timeout: Annotated[
        float, typer.Option(min=0.1, help="Seconds to wait for a server's answer.")
    ] = 10.0,
    max_bad_fraction: Annotated[
        float, typer.Option(min=0, max=1, help="Exit code 1 when more than this part is bad.")
    ] = 0.1,
    as_json: Json = False,
) -> None:
    """Pack captioned pictures into WebDataset shards; list the bad ones with row and reason.

    When it was cut short, the same command again goes on where it stopped.
    """
    from clipserve.sources import first_lines
    from clipserve.sources.fetch import FetchLimits
    from training.shards import BAD_FILE, PackOptions
    from training.shards import pack as pack_source

    how = PackOptions(
        source=options,
        samples_per_shard=samples_per_shard,
        val_fraction=val_fraction,
        split_by=split_by,
        fetch=FetchLimits(threads=fetch_threads, timeout_s=fetch_timeout),
    )
    with Counter("packing") as counter:
        report = pack_source(source, out, how, counter.update)
    if as_json:
        print_json(
            {
                "packed": report.packed,
                "bad_fraction": report.bad_fraction,
                "bad_by_kind": report.bad_by_kind,
                "bad_file": str(out / BAD_FILE),
                "first_bad": [vars(record) for record in report.first_bad],
            }
        )
    else:
        for line in first_lines(report.first_bad, report.num_bad):
            print_line(f"bad: {line}")
        for name, count in report.packed.items():
            if not count:
                print_line(f"nothing fell into {out / name}; raise or lower --val-fraction")
        parts = ", ".join(f"{count} in {out / name}" for name, count in report.packed.items())
        kinds = ", ".join(f"{count} {kind}" for kind, count in report.bad_by_kind.items())
        print_line(f"packed {parts}; {report.num_bad} bad{f' ({kinds})' if kinds else ''}")
    if report.bad_fraction > max_bad_fraction:
        fail(
            f"{report.bad_fraction:.1%} of the samples are bad, more than --max-bad-fraction"
            f" {max_bad_fraction:.1%}; the good ones are packed, the bad ones in {out / BAD_FILE}",
            code=1,
        )


def verify(
    location: Annotated[
        str, typer.Argument(help="A model directory, or shards: a folder, a .tar, a pattern.")
    ],
    decode: Annotated[bool, typer.Option("--decode", help="Decode every picture, too.")] = False,
    rescan: Annotated[
        bool, typer.Option("--rescan", help="Replace the manifest by what is found now.")
    ] = False,
    no_write: Annotated[
        bool, typer.Option("--no-write", help="Never write a manifest beside the shards.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Check every byte of a model directory or of shards; exit code 1 if something is damaged.

    A folder of shards without a manifest gets one.
    """
    from clipserve import checkpoint

    if checkpoint.is_model_directory(Path(location)):
        _verify_model(Path(location), as_json)
    else:
        _verify_shards(location, decode, rescan, not no_write, as_json)


def _verify_model(path: Path, as_json: bool) -> None:
    from clipserve import checkpoint
    from training.state import verify_state

    try:
        directory = checkpoint.pin(path)
        description = checkpoint.verify(directory)
        verify_state(directory)
    except ClipserveError as error:
        fail(str(error), code=1)
    files, fingerprint = len(description["files"]), description["fingerprint"]
    if as_json:
        print_json({"model": str(path), "files": files, "fingerprint": fingerprint})
    else:
        print_line(f"{path}: model directory is whole, {files} files, fingerprint {fingerprint}")


def _verify_shards(location: str, decode: bool, rescan: bool, write: bool, as_json: bool) -> None:
    from clipserve.shards.verify import verify as verify_shards

    with Counter("scanning, MiB") as counter:
        report = verify_shards(
            location,
            decode=decode,
            rescan=rescan,
            write=write,
            progress=lambda done, total: counter.update(done >> 20, total >> 20),
        )
    shards, samples = len(report.manifest.shards), report.manifest.num_samples
    if as_json:
        print_json(
            {
                "shards": shards,
                "samples": samples,
                "bad": [vars(bad) for bad in report.bad],
                "problems": report.problems,
                "duplicates": vars(report.duplicates),
                "out_of_order": report.num_out_of_order,
            }
        )
    else:
        for bad in report.bad:
            print_line(f"bad: {bad.shard}:{bad.key}: {bad.kind}: {bad.reason}")
        for group in report.duplicates.first:
            print_line(f"the same picture: {', '.join(group)}")
        print_line(
            f"{shards} shards, {samples} samples, {len(report.bad)} bad;"
            f" {report.duplicates.groups} pictures occur more than once;"
            f" {report.num_out_of_order} samples have their members apart"
        )
        if report.written:
            print_line(f"wrote {report.written / 'manifest.json'}")
    if report.problems:
        fail("; ".join(report.problems), code=1)
    if report.bad:
        fail(f"{len(report.bad)} bad samples are left out of training; see the list", code=1)
