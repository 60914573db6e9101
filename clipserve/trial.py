"""Whether a network with fresh weights works: mistakes in its sizes that only a pass would tell.

Other packages build a tower that no picture of its size fits through, or a text tower with fewer
words than its tokenizer knows. Start at `try_out`.
"""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn

from clipserve.errors import ConfigError, first_line
from clipserve.towers import BUILDING_ERRORS

if TYPE_CHECKING:
    from clipserve.model import Model

_FEWEST_TOKENS = 3  # start, a word, end


def try_out(model: "Model") -> None:
    """One blank picture and text through both towers; draws no random number, changes nothing.

    ConfigError says what does not fit. Takes less time than drawing the weights did.
    """
    _check_text(model)
    height, width = model.transform.size
    if min(height, width) < 1:
        raise ConfigError(
            f"vision_cfg.image_size gives pictures of {width}x{height} pixels; 224 is usual"
        )
    ids = model.tokenizer([""]).ids
    try:
        with torch.no_grad(), _evaluating(model.network):
            found = model(torch.zeros(1, 3, height, width), ids)
    except (*BUILDING_ERRORS, LookupError, AttributeError) as error:
        raise ConfigError(
            f"model.architecture cannot embed a picture of {width}x{height} and a text of"
            f" {model.context_length} tokens: {first_line(error)}"
        ) from error
    for kind, vector in (("pictures", found.image), ("texts", found.text)):
        if vector.shape != (1, model.embed_dim) or not model.embed_dim:
            shape = tuple(vector.shape[1:])
            raise ConfigError(
                f"model.architecture makes {shape} of {kind}, where embed_dim = {model.embed_dim}"
                " wants a vector; look at its pooling and projection"
            )


def _check_text(model: "Model") -> None:
    text, length = model.architecture["text_cfg"], model.context_length
    if length < _FEWEST_TOKENS:
        raise ConfigError(f"text_cfg.context_length = {length} leaves no room for a word")
    known, size = model.tokenizer.vocab_size, text.get("vocab_size")
    if not text.keys() & {"hf_tokenizer_name", "hf_model_name"} and size and size < known:
        raise ConfigError(
            f"text_cfg.vocab_size = {size} is less than the {known} tokens of the tokenizer; make"
            " them equal"
        )


@contextlib.contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    """Where nothing is dropped and no statistics change; each module is then as it was."""
    trained = [module for module in network.modules() if module.training]
    network.eval()
    try:
        yield
    finally:
        for module in trained:
            module.training = True
