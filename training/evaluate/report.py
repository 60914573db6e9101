"""The evaluation report: which model, on which data, every task's numbers. Start at `evaluate`."""

import time
from typing import Any

from clipserve.config import RerankScore
from clipserve.errors import ConfigError
from clipserve.match import check_fusion
from clipserve.model import Model
from clipserve.shards import ShardSet
from training.evaluate.gallery import embed_shards
from training.evaluate.retrieval import evaluate_retrieval
from training.evaluate.zeroshot import evaluate_zeroshot

TASKS = ("retrieval", "zeroshot")


def evaluate(
    model: Model,
    shards: ShardSet,
    tasks: list[str],
    label_field: str,
    templates: str,
    rerank: int = 0,
    score: RerankScore = "matching",
) -> dict[str, Any]:
    """Run `tasks`. Rates are fractions of one. `rerank` as in `evaluate_retrieval`."""
    unknown = [task for task in tasks if task not in TASKS]
    if unknown or not tasks:
        raise ConfigError(f"unknown tasks {', '.join(unknown) or '(none)'}; use {', '.join(TASKS)}")
    if rerank:
        check_fusion(model)
    start = time.monotonic()
    gallery = embed_shards(model, shards)
    report: dict[str, Any] = {
        "model": model.info.name,
        "fingerprint": model.info.fingerprint,
        "data_fingerprint": shards.manifest.fingerprint,
        "num_images": len(gallery.images),
        "num_texts": len(gallery.texts),
    }
    if "retrieval" in tasks:
        report["retrieval"] = evaluate_retrieval(
            model, shards, gallery=gallery, rerank=rerank, score=score
        )
    if "zeroshot" in tasks:
        scores = evaluate_zeroshot(model, shards, gallery.images, label_field, templates)
        report["zeroshot"] = {**scores, "label_field": label_field, "templates": templates}
    report["seconds"] = round(time.monotonic() - start, 2)
    return report
