"""open_clip's ViT-B/32 weights as a directory of transformers' CLIPModel, for Infinity to serve.

    python service_transformers.py WEIGHTS.pt OUT bpe_simple_vocab_16e6.txt.gz

Runs in Infinity's environment, with none of our packages. `max_length` is set because Infinity
0.0.78 takes it for the length of texts in tokens, and would cut all at 20, the default.
"""

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
ALONE = {
    "logit_scale": "logit_scale",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
}


def main() -> None:
    weights, out = Path(sys.argv[1]), Path(sys.argv[2])
    given = torch.load(weights, weights_only=True, map_location="cpu")
    config = CLIPConfig(
        text_config={"hidden_act": "gelu", "eos_token_id": 49407, "bos_token_id": 49406},
        vision_config={"hidden_act": "gelu", "patch_size": 32},
        projection_dim=512,
    )
    model = CLIPModel(config)
    model.load_state_dict(converted(given), strict=False)
    missing = set(model.state_dict()) - set(converted(given))
    if any("position_ids" not in name for name in missing):
        raise SystemExit(f"not converted: {sorted(missing)[:5]}")
    model.save_pretrained(out)
    CLIPImageProcessor().save_pretrained(out)
    write_tokenizer(out)
    description = json.loads((out / "config.json").read_text()) | {"max_length": 77}
    (out / "config.json").write_text(json.dumps(description, indent=2))


def converted(given: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in given.items():
        if name in ALONE:
            found[ALONE[name]] = value
        elif name == "text_projection":
            found["text_projection.weight"] = value.T.contiguous()
        elif name == "visual.proj":
            found["visual_projection.weight"] = value.T.contiguous()
        elif "resblocks" in name:
            found |= block(name, value)
    return found


def block(name: str, value: Any) -> dict[str, Any]:
    tower = "vision_model" if name.startswith("visual.") else "text_model"
    number, _, rest = name.partition("resblocks.")[2].partition(".")
    prefix = f"{tower}.encoder.layers.{number}."
    module, _, kind = rest.rpartition(".")
    if module == "attn":  # in_proj_weight, in_proj_bias
        parts = zip("qkv", value.chunk(3), strict=True)
        suffix = kind.removeprefix("in_proj_")
        return {f"{prefix}self_attn.{p}_proj.{suffix}": part.clone() for p, part in parts}
    return {f"{prefix}{BLOCK[module]}.{kind}": value}


def write_tokenizer(out: Path) -> None:
    """From the merges that open_clip's package brings."""
    lines = gzip.decompress(Path(sys.argv[3]).read_bytes()).decode().split("\n")
    merges = lines[1 : 49152 - 256 - 2 + 1]
    units = list(bytes_to_unicode())
    words = units + [unit + "</w>" for unit in units] + ["".join(m.split()) for m in merges]
    words += ["<|startoftext|>", "<|endoftext|>"]
    out.mkdir(parents=True, exist_ok=True)
    (out / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (out / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    tokenizer = CLIPTokenizer(str(out / "vocab.json"), str(out / "merges.txt"), model_max_length=77)
    tokenizer.save_pretrained(out)


def bytes_to_unicode() -> list[str]:
    """The printable characters that stand for the 256 bytes, in CLIP's order."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return [chr(byte) for byte in shown] + [chr(256 + i) for i in range(len(hidden))]


if __name__ == "__main__":
    main()
