"""A model directory -> what other programs read, whole and held against ours, or not there at all.

Start at `export_model`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from clipserve import checkpoint
from clipserve.convert.albef import export_checkpoint
from clipserve.convert.found import refuse_existing
from clipserve.convert.proof import Proof
from clipserve.files import new_directory
from clipserve.model import Model

Form = Literal["albef", "open_clip", "transformers", "onnx"]


def export_model(source: Path, out: Path, form: Form) -> tuple[Proof, list[str]]:
    """Write the model of a directory in another form into a new directory, of albef into a file.

    Returns the least cosines to ours, and a line for each thing that is otherwise there. Raises
    ConfigError, naming what has no counterpart, and CheckpointError if the copy embeds otherwise;
    then nothing is left.
    """
    if form == "albef":
        return export_checkpoint(source, out)
    refuse_existing(out)
    model = checkpoint.load_for_training(source)
    write = _writer(form)
    with new_directory(out.absolute(), replace=False) as folder:
        return write(model, folder)


def _writer(form: Form) -> Callable[[Model, Path], tuple[Proof, list[str]]]:
    if form == "open_clip":
        from clipserve.convert.open_clip_writing import write_open_clip

        return write_open_clip
    if form == "transformers":
        from clipserve.convert.transformers_writing import write_transformers

        return write_transformers
    from clipserve.convert.onnx_writing import write_onnx

    return write_onnx
