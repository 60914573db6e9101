"""What this machine has, what clipserve would use of it, and what is missing."""

import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from typing import Any

_PACKAGES = ("torch", "torchvision", "open_clip_torch", "transformers", "webdataset", "fastapi")
_FAISS = ("faiss-cpu", "faiss-gpu", "faiss-gpu-cuvs")


def examine() -> dict[str, Any]:
    """Facts by name, and a list of findings that say what to do."""
    import torch
    from PIL import features

    from clipserve.embed import resolve_device, resolve_dtype
    from clipserve.packed import multiplies_int8
    from clipserve.pictures import find_emoji_font

    device = resolve_device("auto")
    faiss = [name for name in _FAISS if _version(name)]
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in (*_PACKAGES, *faiss)},
        "cpus": len(os.sched_getaffinity(0)),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "device": str(device),
        "inference_dtype": str(resolve_dtype("auto", device)).removeprefix("torch."),
        "int8": device.type == "cpu" and multiplies_int8(),
        "compiler": shutil.which("g++") or shutil.which("clang++"),
        "emoji_font": str(find_emoji_font() or "") or None,
        "free_disk_gb": round(shutil.disk_usage(".").free / 1e9, 1),
    }
    findings = []
    if len(faiss) != 1:
        found = ", ".join(faiss) or "none"
        findings.append(f"exactly one of {', '.join(_FAISS)} must be installed; found: {found}")
    if facts["gpus"] and faiss == ["faiss-cpu"]:
        findings.append("a GPU is here but faiss-cpu is installed; clipserve[gpu] searches on it")
    if not facts["compiler"]:
        findings.append("no C++ compiler: train.compile=on is not possible; install g++")
    if not facts["emoji_font"]:
        missing = "fonts-noto-color-emoji" if features.check("raqm") else "libfribidi0 (for Raqm)"
        findings.append(f"the demo falls back to handwritten digits; install {missing}")
    facts["findings"] = findings or ["nothing is missing"]
    return facts


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
