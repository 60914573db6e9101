"""The evaluation report: which model, on which data, every task's numbers. Start at `evaluate`."""

import time
from typing import Any

from clipserve.errors import ConfigError
from clipserve.metrics import retrieval
from clipserve.model import Model
from clipserve.shards import ShardSet
from training.evaluate.retrieval import embed_shards
from training.evaluate.zeroshot import evaluate_zeroshot

TASKS = ("retrieval", "zeroshot")


def evaluate(
    model: Model, shards: ShardSet, tasks: list[str], label_field: str, templates: str
) -> dict[str, Any]:
    """Run `tasks` on one pass over the pictures. Rates are fractions of one."""
    unknown = [task for task in tasks if task not in TASKS]
    if unknown or not tasks:
        raise ConfigError(f"unknown tasks {', '.join(unknown) or '(none)'}; use {', '.join(TASKS)}")
    start = time.monotonic()
    images, texts, _, text_of = embed_shards(model, shards)
    report: dict[str, Any] = {
        "model": model.info.name,
        "fingerprint": model.info.fingerprint,
        "data_fingerprint": shards.manifest.fingerprint,
        "num_images": len(images),
        "num_texts": len(texts),
    }
    if "retrieval" in tasks:
        report["retrieval"] = retrieval(images, texts, text_of)
    if "zeroshot" in tasks:
        scores = evaluate_zeroshot(model, shards, images, label_field, templates)
        report["zeroshot"] = {**scores, "label_field": label_field, "templates": templates}
    report["seconds"] = round(time.monotonic() - start, 2)
    return report
