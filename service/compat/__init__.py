"""The routes of other services, so that their clients work here unchanged; a file for each family.

Every adapter translates to the pipeline and the registry, as our own routes do, and answers in its
client's shape. Errors are ours, with the status that tells. OpenAI's and Jina's embeddings are
`service/routes/embeddings.py`. Start at `ROUTERS`.
"""

from service.compat import (
    clip_as_service,
    clip_retrieval,
    cohere,
    infinity,
    rerank,
    tei,
    weaviate,
)

ROUTERS = (
    infinity.router,
    rerank.router,
    cohere.router,
    clip_as_service.router,
    clip_retrieval.router,
    tei.router,
    weaviate.router,
)
