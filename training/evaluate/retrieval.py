"""Image-text retrieval on shards: captions search the pictures, pictures the captions."""

from clipserve.config import RerankScore
from clipserve.match import check_fusion
from clipserve.metrics import retrieval
from clipserve.model import Model
from clipserve.shards import ShardSet
from training.distributed import ALONE, World
from training.evaluate.gallery import Gallery, embed_shards
from training.evaluate.rerank import evaluate_reranked


def evaluate_retrieval(
    model: Model,
    shards: ShardSet,
    prefix: str = "",
    *,
    gallery: Gallery | None = None,
    rerank: int = 0,
    score: RerankScore = "matching",
    world: World = ALONE,
) -> dict[str, float]:
    """Recall at 1, 5 and 10 both ways over the whole set; keys as in `clipserve.metrics`.

    With `rerank` candidates per query also `reranked_...`, see `evaluate_reranked`; ConfigError for
    a model that cannot, before anything is embedded. The ranks share the work; the first has the
    scores, the others nothing. `gallery` is `embed_shards(model, shards)`, if it is there already.
    """
    if rerank:
        check_fusion(model)
    gallery = gallery or embed_shards(model, shards, world=world)
    scores: dict[str, float] = {}
    if world.is_main:
        scores = retrieval(gallery.images, gallery.texts, gallery.text_of, prefix)
    if rerank:
        again = f"{prefix}reranked_"
        scores |= evaluate_reranked(model, shards, gallery, rerank, score, again, world)
    return scores
