"""The REST service and its web page: embeddings, zero-shot classification, search, collections.

Start at `app.create_app`. A request goes limits -> routes -> pipeline (decode and tokenise in a
thread pool) -> batching (one thread per model) and back; `registry` holds what is served.
"""
