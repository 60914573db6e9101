"""The `clipserve` command: parse, call one function, print.

Nothing heavy is imported before a subcommand runs. A user's mistake ends with one line and exit
code 2. `--json` prints what a program may read.
"""

import importlib.metadata
import logging
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn, get_args

import typer

from clipserve.console import Counter, fail, print_json, print_line
from clipserve.errors import ClipserveError, ConfigError

app = typer.Typer(
    name="clipserve",
    help="Captioned pictures in, a zero-shot classifier and an image-text search service out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
index_app = typer.Typer(help="Build and inspect the search index of a collection.")
app.add_typer(index_app, name="index", no_args_is_help=True)

_OWN_PACKAGES = ("clipserve", "training", "service", "index")

ModelDir = Annotated[str, typer.Argument(metavar="MODEL", help="Model directory.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[str, typer.Option(help="auto, fp32 or bf16.")]
ImageColumn = Annotated[
    str | None, typer.Option(help="Column with the picture's path, http(s) URL, or bytes.")
]
CaptionColumn = Annotated[
    str | None, typer.Option(help="Column with the caption; several, comma separated.")
]
CaptionTemplate = Annotated[
    str | None, typer.Option(help='Make captions of columns: "{title}, {colour}".')
]
IdColumn = Annotated[str | None, typer.Option(help="Column with unique ids.")]
GroupBy = Annotated[
    str | None,
    typer.Option(help="Join neighbouring rows with one value in this column: several captions."),
]
Split = Annotated[
    str | None, typer.Option(help='Only these values of the field "split", comma separated.')
]
ImageFolder = Annotated[
    Path | None, typer.Option(help="Where relative picture paths begin; else beside the table.")
]


@app.command()
def pack(
    source: Annotated[
        str,
        typer.Argument(
            help="A .csv, .tsv, .jsonl, .json or .parquet file, a folder, shards, or hf:NAME."
        ),
    ],
    out: Annotated[Path, typer.Argument(help="New folder for the shards.")],
    image_column: ImageColumn = None,
    caption_column: CaptionColumn = None,
    caption_template: CaptionTemplate = None,
    id_column: IdColumn = None,
    group_by: GroupBy = None,
    split: Split = None,
    image_folder: ImageFolder = None,
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
    from clipserve.sources import SourceOptions, first_lines
    from clipserve.sources.fetch import FetchLimits
    from training.shards import BAD_FILE, PackOptions
    from training.shards import pack as pack_source

    options = PackOptions(
        source=SourceOptions(
            image_column=image_column,
            caption_column=caption_column,
            caption_template=caption_template,
            id_column=id_column,
            group_by=group_by,
            split=split,
            image_folder=image_folder,
        ),
        samples_per_shard=samples_per_shard,
        val_fraction=val_fraction,
        split_by=split_by,
        fetch=FetchLimits(threads=fetch_threads, timeout_s=fetch_timeout),
    )
    with Counter("packing") as counter:
        report = pack_source(source, out, options, counter.update)
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


@app.command()
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
        description = checkpoint.verify(path)
        verify_state(path)
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


@app.command()
def train(
    config: Annotated[Path | None, typer.Argument(metavar="CONFIG.toml")] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[section.key=value ...]")
    ] = None,
    resume: Annotated[
        str, typer.Option(help="auto: continue the run in `out`; no; or a checkpoint directory.")
    ] = "auto",
    help_config: Annotated[bool, typer.Option("--help-config", help="List every setting.")] = False,
) -> None:
    """Train a model. The config file may be left out when overrides say enough."""
    from clipserve.config import describe_fields, load_config

    if help_config:
        for name, default, meaning in describe_fields():
            print_line(f"{name} (default {default})\n    {meaning}")
        return
    given = list(overrides or [])
    is_override = config is not None and "=" in str(config) and config.suffix != ".toml"
    if is_override:
        given, config = [str(config), *given], None
    settings = load_config(config, given)
    _setup_logging()
    from training.loop import train as run

    result = run(settings, resume)
    if result.stopped_by is not None:
        saved = f"after step {result.step}, which is saved" if result.step else "before any step"
        fail(
            f"stopped by {result.stopped_by.name} {saved}; the same command goes on from there",
            code=128 + result.stopped_by,
        )
    rates = "  ".join(
        f"{key.removeprefix('val/')} {value:.1%}"
        for key, value in result.metrics.items()
        if key.endswith(("_r1", "_r10"))
    )
    speed = f"{result.samples_per_second:.0f} samples/s"
    print_line(f"trained {result.step} steps in {result.seconds:.0f} s ({speed})  {rates}")
    print_line(f"model: {result.best}")


@app.command()
def evaluate(
    model: ModelDir,
    data: Annotated[Path, typer.Option(help="Shards to evaluate on.")],
    tasks: Annotated[str, typer.Option(help="Comma-separated: retrieval, zeroshot.")] = "retrieval",
    label_field: Annotated[
        str, typer.Option(help="zeroshot: the JSON field with the class; `caption` for the text.")
    ] = "caption",
    templates: Annotated[str, typer.Option(help="zeroshot: template set or file.")] = "none",
    rerank: Annotated[
        int, typer.Option(min=0, help="retrieval: candidates that ALBEF's matching orders again.")
    ] = 0,
    rerank_score: Annotated[
        str, typer.Option(help="matching, matching+cosine, or matching+contrastive.")
    ] = "matching",
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Measure a model on shards; prints JSON, rates as fractions of one."""
    from clipserve.checkpoint import load
    from clipserve.config import RerankScore
    from clipserve.shards import ShardSet
    from training.evaluate.report import evaluate as run

    wanted = [task.strip() for task in tasks.split(",") if task.strip()]
    if rerank and "retrieval" not in wanted:
        raise ConfigError("--rerank is for the task retrieval; add it to --tasks")
    score = next((known for known in get_args(RerankScore) if known == rerank_score), None)
    if score is None:
        raise ConfigError(
            f"--rerank-score {rerank_score!r} is not one of {', '.join(get_args(RerankScore))}"
        )
    if score != "matching" and not rerank:
        raise ConfigError("--rerank-score needs --rerank K, the number of candidates")
    shards = ShardSet.open(data)
    loaded = load(model, device, dtype)
    print_json(run(loaded, shards, wanted, label_field, templates, rerank, score))


@app.command()
def embed(
    model: ModelDir,
    source: Annotated[
        str, typer.Argument(help="Shards, a table, a folder of pictures, or hf:NAME.")
    ],
    collection: Annotated[Path, typer.Option(help="Collection directory to fill.")],
    image_column: ImageColumn = None,
    caption_column: CaptionColumn = None,
    caption_template: CaptionTemplate = None,
    id_column: IdColumn = None,
    group_by: GroupBy = None,
    split: Split = None,
    image_folder: ImageFolder = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    overwrite: Annotated[bool, typer.Option(help="Embed again what is already there.")] = False,
    max_bad_fraction: Annotated[
        float, typer.Option(min=0, max=1, help="Exit code 1 when more than this part is bad.")
    ] = 0.1,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Embed pictures into a collection; what is already there is skipped, so it can be repeated."""
    from clipserve.checkpoint import load
    from clipserve.sources import SourceOptions, first_lines
    from index.embed_corpus import embed_corpus

    loaded = load(model, device, dtype)
    with Counter("embedding") as counter:
        report = embed_corpus(
            loaded,
            source,
            collection,
            options=SourceOptions(
                image_column=image_column,
                caption_column=caption_column,
                caption_template=caption_template,
                id_column=id_column,
                group_by=group_by,
                split=split,
                image_folder=image_folder,
            ),
            batch_size=batch_size,
            overwrite=overwrite,
            progress=counter.update,
        )
    if as_json:
        bad = [vars(record) for record in report.bad]
        print_json({"added": report.added, "skipped": report.skipped, "bad": bad})
    else:
        for line in first_lines(report.bad):
            print_line(f"bad: {line}")
        rate = report.added / report.seconds if report.seconds else 0.0
        print_line(
            f"added {report.added}, skipped {report.skipped} already there, {len(report.bad)} bad;"
            f" {report.seconds:.1f} s, {rate:.0f} pictures/s"
        )
    total = report.added + report.skipped + len(report.bad)
    if len(report.bad) > max_bad_fraction * total:
        fail(
            f"{len(report.bad)} of {total} samples are bad, more than --max-bad-fraction"
            f" {max_bad_fraction:.1%}; the good ones are in {collection}",
            code=1,
        )


@index_app.command("build")
def index_build(
    collection: Annotated[Path, typer.Argument(help="Collection directory.")],
    kind: Annotated[str, typer.Option(help="auto, exact or ivf.")] = "auto",
    as_json: Json = False,
) -> None:
    """Build the search index: exact up to 200,000 vectors, inverted lists (IVF) beyond."""
    from index.build import build
    from index.collection import Collection

    with Collection.open(collection) as opened:
        info = build(opened, kind=kind)
    print_json(vars(info)) if as_json else print_line(
        f"{info.kind}, {info.count} vectors: {info.reason}"
    )


@index_app.command("info")
def index_info(
    collection: Annotated[Path, typer.Argument(help="Collection directory.")],
    as_json: Json = False,
) -> None:
    """What a collection holds, and how it is searched."""
    from index.build import read_info
    from index.collection import Collection

    with Collection.open(collection, read_only=True) as opened:
        info = read_info(collection)
        facts: dict[str, Any] = {
            "collection": opened.name,
            "items": opened.count(),
            "model": opened.model_name,
            "fingerprint": opened.fingerprint,
            "embed_dim": opened.embed_dim,
            "index": vars(info) if info else None,
        }
    if as_json:
        print_json(facts)
        return
    for key, value in facts.items():
        print_line(f"{key}: {value if value is not None else 'none; searched exactly'}")


@app.command()
def search(
    collection: Annotated[Path, typer.Argument(help="Collection directory.")],
    query: Annotated[str | None, typer.Argument(help="A text.")] = None,
    model: Annotated[str, typer.Option(help="Model directory.")] = "",
    image: Annotated[Path | None, typer.Option(help="Search with a picture instead.")] = None,
    k: Annotated[int, typer.Option("-k", min=1, max=10000, help="Number of hits.")] = 10,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Search a collection with a text or a picture."""
    if (query is None) == (image is None):
        raise ConfigError("give either a text to search for, or --image FILE")
    if not model:
        raise ConfigError("--model MODEL is required: the model that filled the collection")
    from clipserve.checkpoint import load, read_description
    from index.collection import Collection

    with Collection.open(collection, read_only=True) as opened:  # before the slow part
        opened.check_model(read_description(Path(model))["fingerprint"])
    loaded = load(model, device, dtype)
    from index.search import Searcher

    vectors = (
        loaded.embed_texts([query]) if query is not None else loaded.embed_images([image or ""])
    )
    searcher = Searcher(collection, fingerprint=loaded.info.fingerprint)
    hits = searcher.search(vectors, k)[0]
    searcher.close()
    if as_json:
        print_json([vars(hit) for hit in hits])
        return
    for rank, hit in enumerate(hits, start=1):
        print_line(f"{rank:>3}  {hit.score:.4f}  {hit.id}  {hit.caption}")


@app.command()
def classify(
    model: ModelDir,
    images: Annotated[list[Path], typer.Argument(help="Picture files.")],
    labels: Annotated[str, typer.Option(help="Comma-separated class names, or @FILE, one a line.")],
    templates: Annotated[str, typer.Option(help="Template set or file.")] = "none",
    top: Annotated[int, typer.Option(min=1, help="Classes to show per picture.")] = 5,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Zero-shot classification of pictures into the classes you name."""
    names = _read_labels(labels)
    for image in images:
        if not image.is_file():
            raise ConfigError(f"picture {image} does not exist")
    from clipserve.checkpoint import load

    loaded = load(model, device, dtype)
    head = loaded.zero_shot(names, templates)
    results = []
    for image, row in zip(images, head.classify(list(images)), strict=True):
        best = sorted(zip(head.labels, row.tolist(), strict=True), key=lambda pair: -pair[1])[:top]
        results.append({"image": str(image), "classes": [{"label": n, "p": p} for n, p in best]})
        if not as_json:
            print_line("  ".join([str(image), *(f"{name} {p:.1%}" for name, p in best)]))
    if as_json:
        print_json(results)


@app.command("import")
def import_model(
    source: Annotated[Path, typer.Argument(help="The checkpoint file.")],
    out: Annotated[Path, typer.Argument(help="Model directory to write.")],
    tokenizer: Annotated[
        Path | None, typer.Option(help="Folder of the BERT whose vocabulary it was trained with.")
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Another input size; positions are interpolated.")
    ] = None,
) -> None:
    """Make a model directory of a checkpoint that ALBEF published."""
    from clipserve.convert import import_checkpoint

    fingerprint = import_checkpoint(source, out, "albef", image_size, tokenizer)
    print_line(f"model: {out} ({fingerprint[:12]})")


@app.command("export")
def export_model(
    model: ModelDir,
    out: Annotated[Path, typer.Argument(help="File to write.")],
    to: Annotated[str, typer.Option(help="albef: the layout that ALBEF publishes.")] = "albef",
) -> None:
    """Write a model directory as others read it."""
    from clipserve.convert import export_checkpoint

    if to != "albef":
        raise ConfigError(f"--to {to!r}: only albef is known")
    export_checkpoint(Path(model), out, "albef")
    print_line(f"written: {out}")


@app.command()
def serve(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Model directories.")],
    collection: Annotated[
        list[Path] | None, typer.Option(help="Collection directory; may be repeated.")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="Port to listen on.")] = None,
) -> None:
    """Serve models and collections over REST, with a web page at /. Stop with Ctrl-C."""
    _setup_logging()
    from service.app import serve as run
    from service.settings import load_settings

    settings = load_settings(host=host, port=port)
    run([Path(model) for model in models], list(collection or []), settings)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Run directory.")] = Path("runs/demo"),
    serve: Annotated[bool, typer.Option(help="Stay up and serve the web page.")] = True,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the service.")] = 8000,
) -> None:
    """Train a small CLIP on emoji, search and classify with it over HTTP: all of it, in minutes."""
    from clipserve.demo import run

    run(out, stay=serve, port=port)


@app.command()
def doctor(as_json: Json = False) -> None:
    """What this machine has, what clipserve would use, and what is missing."""
    from clipserve.doctor import examine

    facts = examine()
    if as_json:
        print_json(facts)
        return
    for key, value in facts.items():
        print_line(f"{key}: {value}")


def main() -> NoReturn:
    """Entry point: errors of the user become one line and their exit code."""
    try:
        if "--help" not in sys.argv:  # which should answer at once
            _check_ownership()
        app(standalone_mode=False)
    except ClipserveError as error:
        fail("; ".join([str(error), *getattr(error, "__notes__", [])]), error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        fail("interrupted", code=130)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        fail(f"{where}{error.strerror or error}", code=2)
    except Exception as error:
        _exit_for_click(error)
        raise
    sys.exit(0)


def _exit_for_click(error: Exception) -> None:
    """Usage errors and explicit exits of the parser, as it would end itself in standalone mode."""
    show, code = getattr(error, "show", None), getattr(error, "exit_code", None)
    if code is not None:
        if show is not None:
            show()
        sys.exit(code)


def _check_ownership() -> None:
    """Refuse to start when another distribution owns one of our generic package names."""
    owners = importlib.metadata.packages_distributions()
    for package in _OWN_PACKAGES:
        others = set(owners.get(package, [])) - {"clipserve"}
        if others:
            raise ConfigError(
                f"{', '.join(sorted(others))} also installs a module named {package!r};"
                " give clipserve an environment of its own"
            )


def _read_labels(labels: str) -> list[str]:
    if not labels.startswith("@"):
        return [label.strip() for label in labels.split(",") if label.strip()]
    try:
        lines = Path(labels[1:]).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--labels {labels}: {error}") from None
    return [line.strip() for line in lines if line.strip()]


def _setup_logging() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    # The latter log whole addresses, signatures and all.
    for name in ("faiss.loader", "httpx", "httpcore", "fsspec", "aiohttp", "botocore"):
        logging.getLogger(name).setLevel(logging.WARNING)
