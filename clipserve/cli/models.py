"""Commands on one model: classify, import, export; and doctor, on the machine it would run on."""

from pathlib import Path
from typing import Annotated, get_args

import typer

from clipserve.cli.options import Device, Dtype, Json, ModelDir, pick
from clipserve.console import print_json, print_line
from clipserve.errors import ConfigError


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


def import_model(
    source: Annotated[
        Path,
        typer.Argument(
            help="Directory of open_clip, transformers or clipserve; or a file; or what other"
            " programs have fetched: hf-hub:OWNER/NAME, ViT-B-32:openai."
        ),
    ],
    out: Annotated[Path, typer.Argument(help="New model directory.")],
    architecture: Annotated[
        str | None, typer.Option(help="Of a file of weights: open_clip's name, as ViT-B-32.")
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="Folder of the tokenizer, if not beside the weights; ALBEF: of a BERT."),
    ] = None,
    context_length: Annotated[
        int | None,
        typer.Option(min=3, help="Another text context: positions stretched or cut."),
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Another input size; positions are interpolated.")
    ] = None,
) -> None:
    """Make a model directory of what open_clip, OpenAI, transformers or ALBEF published."""
    from clipserve.convert import import_model as convert

    fingerprint, notes = convert(
        source,
        out,
        architecture=architecture,
        tokenizer=tokenizer,
        context_length=context_length,
        image_size=image_size,
    )
    for note in notes:
        print_line(note)
    print_line(f"model: {out} ({fingerprint[:12]})")


def export_model(
    model: ModelDir,
    out: Annotated[Path, typer.Argument(help="New directory; of albef a file.")],
    to: Annotated[
        str,
        typer.Option("--to", "--format", help="open_clip, transformers, onnx, or albef: one file."),
    ],
) -> None:
    """Write a model directory as others read it, and hold what was written against it."""
    from clipserve.convert import export_model as convert
    from clipserve.convert.writing import Form

    proof, notes = convert(Path(model), out, pick(to, get_args(Form), "--to"))
    for note in notes:
        print_line(f"otherwise there: {note}")
    print_line(str(proof))
    print_line(f"written: {out}")


def doctor(as_json: Json = False) -> None:
    """What this machine has, what clipserve would use, and what is missing."""
    from clipserve.doctor import examine

    facts = examine()
    if as_json:
        print_json(facts)
        return
    for key, value in facts.items():
        print_line(f"{key}: {value}")


def _read_labels(labels: str) -> list[str]:
    if not labels.startswith("@"):
        return [label.strip() for label in labels.split(",") if label.strip()]
    try:
        lines = Path(labels[1:]).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--labels {labels}: {error}") from None
    return [line.strip() for line in lines if line.strip()]
