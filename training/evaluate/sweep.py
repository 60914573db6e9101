"""Recall on several tasks along the way from one model to another. Start at `sweep`."""

from collections.abc import Sequence
from typing import Any

from clipserve.embed import prepare
from clipserve.interpolate import mix
from clipserve.model import Model
from clipserve.shards import ShardSet
from training.evaluate.retrieval import evaluate_retrieval


def sweep(
    start: Model,
    tuned: Model,
    alphas: Sequence[float],
    sets: Sequence[ShardSet],
    device: str = "auto",
    dtype: str = "auto",
) -> dict[str, Any]:
    """For each alpha the retrieval metrics on each set, as fractions of one."""
    rows = []
    for alpha in alphas:
        model = prepare(mix(start, tuned, alpha), device, dtype)
        rows.append({"alpha": alpha, "recall": [evaluate_retrieval(model, s) for s in sets]})
    return {
        "start": {"name": start.info.name, "fingerprint": start.info.fingerprint},
        "tuned": {"name": tuned.info.name, "fingerprint": tuned.info.fingerprint},
        "data_fingerprints": [shards.manifest.fingerprint for shards in sets],
        "rows": rows,
    }
