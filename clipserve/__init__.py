"""clipserve: captioned pictures in, a zero-shot classifier and an image-text search service out.

The public API, imported on first use so that `import clipserve` stays light:

    model = clipserve.load("runs/emoji/best")
    model.embed_images(["cat.jpg"])  # (N, E) float32, unit length
    model.embed_texts(["a red heart"])  # (N, E) float32, unit length
    model.zero_shot(["cat", "dog"]).classify(["cat.jpg"])  # (N, C) probabilities
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clipserve.checkpoint import load
    from clipserve.model import Model
    from clipserve.prompts import ClassHead

__version__ = "0.1.0"
__all__ = ["ClassHead", "Model", "load"]

_HOMES = {
    "load": "clipserve.checkpoint",
    "Model": "clipserve.model",
    "ClassHead": "clipserve.prompts",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'clipserve' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
