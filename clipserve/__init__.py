"""clipserve: captioned pictures in, a zero-shot classifier and an image-text search service out.

The public API, imported on first use so that `import clipserve` stays light:

    model = clipserve.load("runs/emoji/best")
    model.embed_images(["cat.jpg"])  # (N, E) float32, unit length
    model.embed_texts(["a red heart"])  # (N, E) float32, unit length
    model.zero_shot(["cat", "dog"]).classify(["cat.jpg"])  # (N, C) probabilities

The same from a running service, which needs neither a model here nor torch's start:

    client = clipserve.Client("http://127.0.0.1:8000")  # or AsyncClient
    client.embed_images(["cat.jpg"])
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clipserve.checkpoint import load
    from clipserve.client import AsyncClient, Client
    from clipserve.model import Model
    from clipserve.prompts import ClassHead

__version__ = "0.1.0"
__all__ = ["AsyncClient", "ClassHead", "Client", "Model", "load"]

_HOMES = {
    "load": "clipserve.checkpoint",
    "Model": "clipserve.model",
    "ClassHead": "clipserve.prompts",
    "Client": "clipserve.client",
    "AsyncClient": "clipserve.client",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'clipserve' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
