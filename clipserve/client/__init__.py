"""A client of a running service: `Client`, and `AsyncClient` for event loops.

    client = clipserve.Client("http://127.0.0.1:8000", api_key="csk_...")
    client.embed_images(["cat.jpg", b"...", pil_image])  # (N, E) float32, unit length
    client.classify(["cat.jpg"], ["cat", "dog"])[0][0].label
    client.search(text="a red heart", k=3)[0].id

Any number of items goes in one call: they are sent in batches, several at a time, and come back in
order. Calls that change nothing twice are tried again when the service is busy or away. Start at
`asynchronous.py`; the other client runs it in a thread.
"""

from clipserve.client.answers import Hit, Prediction, Ranked
from clipserve.client.asynchronous import AsyncClient
from clipserve.client.synchronous import Client

__all__ = ["AsyncClient", "Client", "Hit", "Prediction", "Ranked"]
