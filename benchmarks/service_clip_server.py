"""clip-server 0.8.3 on weights of ours, over HTTP: `WEIGHTS.pt PORT cpu|cuda`.

Runs in clip-server's environment, with none of our packages. It serves models of a list of its own,
which it downloads: instead of the download it is given the file. All else is its torch-flow.yml.
"""

import sys

from clip_server.executors.clip_torch import CLIPEncoder
from clip_server.model import openclip_model
from jina import Flow

NAME = "ViT-B-32::laion2b-s34b-b79k"
"""of those with this architecture and GELU, as ours has"""


class Encoder(CLIPEncoder):
    """CLIPEncoder on a file that is there."""

    def __init__(self, weights: str, **options: object) -> None:
        openclip_model.download_model = lambda url, md5sum: weights
        super().__init__(**options)


def main() -> None:
    weights, port, device = sys.argv[1:]
    options = {"name": NAME, "device": device, "weights": weights}
    flow = Flow(port=int(port), protocol="http").add(
        uses=Encoder, uses_with=options, timeout_ready=3_000_000
    )
    with flow:
        flow.block()


if __name__ == "__main__":
    main()
