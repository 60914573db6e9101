"""A CoCa as small as conftest's model."""

from typing import Any


def coca_architecture() -> dict[str, Any]:
    """A table of its own on each call."""
    text = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    return {
        "embed_dim": 32,
        "vision_cfg": {
            "image_size": 32,
            "patch_size": 16,
            "width": 32,
            "layers": 1,
            "head_width": 16,
            "attentional_pool": True,
            "attn_pooler_heads": 2,
            "attn_pooler_queries": 5,
            "output_tokens": True,
        },
        "text_cfg": text | {"embed_cls": True, "output_tokens": True},
        "multimodal_cfg": dict(text),
        "custom_text": True,
    }
