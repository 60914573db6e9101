"""index: durable collections of vectors, and the search over them.

Start at `collection.py` for what is stored, at `search.py` for how a query is answered, at
`build.py` for the FAISS index of a large collection, at `embed_corpus.py` for filling one.
"""
