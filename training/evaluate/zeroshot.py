"""Zero-shot classification on shards: the classes are the distinct labels of the samples."""

import numpy as np

from clipserve.errors import ConfigError
from clipserve.metrics import accuracy
from clipserve.model import Model
from clipserve.shards import ShardSet
from clipserve.sources import clean_captions


def evaluate_zeroshot(
    model: Model, shards: ShardSet, images: np.ndarray, label_field: str, templates: str
) -> dict[str, float]:
    """Top-1 and top-5 accuracy, and that of always answering the most frequent class.

    `images` (N, E) are the unit vectors of the shards' pictures, in order.
    """
    names = read_labels(shards, label_field)
    classes, targets, counts = np.unique(names, return_inverse=True, return_counts=True)
    if len(classes) < 2:
        raise ConfigError(f"zeroshot needs two classes; field {label_field!r} has {len(classes)}")
    head = model.zero_shot(classes.tolist(), templates)
    scores = images @ head.weights.T
    return {
        "acc1": accuracy(scores, targets),
        "acc5": accuracy(scores, targets, k=5),
        "majority_acc1": float(counts.max() / counts.sum()),
        "num_classes": len(classes),
    }


def read_labels(shards: ShardSet, label_field: str) -> list[str]:
    """One label per sample: a field of its JSON, or the first caption for `caption`."""
    labels = []
    for i in range(len(shards)):
        sample = shards.read(i)
        if label_field == "caption":
            value: object = clean_captions(sample.captions)[0]
        else:
            value = sample.metadata.get(label_field)
        if not isinstance(value, str | int) or value == "":
            raise ConfigError(
                f"{sample.shard}:{sample.key} has no {label_field!r};"
                f" its fields: {', '.join(sample.metadata) or 'none'}"
            )
        labels.append(str(value))
    return labels
