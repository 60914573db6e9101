"""Arguments and options that several commands take, and what becomes of them."""

import functools
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from clipserve.errors import ConfigError

if TYPE_CHECKING:
    from clipserve.model import Model

T = TypeVar("T", bound=str)

ModelDir = Annotated[str, typer.Argument(metavar="MODEL", help="Model directory.")]
CollectionDir = Annotated[Path, typer.Argument(metavar="COLLECTION", help="Collection directory.")]
Field = Annotated[str, typer.Option(help="Which vectors: image, or text, those of the captions.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[str, typer.Option(help="auto, fp32, bf16 or int8.")]

_SOURCE_OPTIONS = {
    "image_column": Annotated[
        str | None, typer.Option(help="Column with the picture's path, http(s) URL, or bytes.")
    ],
    "caption_column": Annotated[
        str | None, typer.Option(help="Column with the caption; several, comma separated.")
    ],
    "caption_template": Annotated[
        str | None, typer.Option(help='Make captions of columns: "{title}, {colour}".')
    ],
    "id_column": Annotated[str | None, typer.Option(help="Column with unique ids.")],
    "number_columns": Annotated[
        str | None,
        typer.Option(help="Columns whose texts are numbers to filter by, comma separated."),
    ],
    "group_by": Annotated[
        str | None,
        typer.Option(
            help="Join neighbouring rows with one value in this column: several captions."
        ),
    ],
    "split": Annotated[
        str | None, typer.Option(help='Only these values of the field "split", comma separated.')
    ],
    "image_folder": Annotated[
        Path | None,
        typer.Option(help="Where relative picture paths begin; else beside the table."),
    ],
}


def with_source_options(command: Callable[..., None]) -> Callable[..., None]:
    """In place of its parameter `options` the command line has one option for each of its fields.

    The command gets them as one SourceOptions.
    """

    @functools.wraps(command)
    def parsed(**given: object) -> None:
        from clipserve.sources import SourceOptions

        chosen = {name: given.pop(name) for name in _SOURCE_OPTIONS}
        command(**given, options=SourceOptions(**chosen))  # type: ignore[arg-type]

    shown: list[inspect.Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        if parameter.name == "options":
            shown += [
                parameter.replace(name=name, annotation=annotation, default=None)
                for name, annotation in _SOURCE_OPTIONS.items()
            ]
        else:
            shown.append(parameter)
    parsed.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
    parsed.__annotations__ = {parameter.name: parameter.annotation for parameter in shown}
    return parsed


def pick(given: str, known: Sequence[T], option: str) -> T:
    """The one of the known values that was given."""
    for value in known:
        if value == given:
            return value
    raise ConfigError(f"{option} {given!r} is not one of {', '.join(known)}")


def load_for(collection: Path, model: str, device: str, dtype: str) -> "Model":
    """The model, if it is the one that filled the collection, which is seen before it is loaded."""
    from clipserve.checkpoint import load, pin, read_description
    from index.collection import Collection

    directory = pin(model)
    with Collection.open(collection, read_only=True) as opened:
        opened.check_model(read_description(directory)["fingerprint"])
    return load(directory, device, dtype)
