"""Packed modules against the modules they replace; the rest of a network is left alone."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from albefs import timm_vision, tiny_albef
from conftest import make_picture, needs_int8
from open_clip.transformer import QuickGELU, ResidualAttentionBlock
from torch import Tensor, nn

import clipserve
from clipserve import checkpoint
from clipserve.embed import prepare
from clipserve.model import Model, create
from clipserve.packed import (
    PackedBlock,
    PackedLinear,
    PackedPatches,
    QuantizedLinear,
    is_quantized,
    multiplies_int8,
    pack,
    unpack,
)

DTYPES = [torch.bfloat16, torch.float32]
MASK = torch.full((7, 7), float("-inf")).triu(1)


def assert_close(found: Tensor, expected: Tensor) -> None:
    """To about two steps of bf16 of the values' size, or a few of fp32."""
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    difference = (found.float() - expected.float()).abs().max()
    step = 1e-2 if found.dtype == torch.bfloat16 else 1e-6
    assert difference < 2 * step * expected.float().abs().max()


def a_block(dtype: torch.dtype = torch.bfloat16, **options: object) -> ResidualAttentionBlock:
    torch.manual_seed(0)
    block = ResidualAttentionBlock(64, 4, **options)  # type: ignore[arg-type]
    for parameter in block.parameters():  # biases and norms that a mistake would show in
        nn.init.normal_(parameter, std=0.2)
    return block.to(dtype).eval().requires_grad_(False)


def states(dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(3, 7, 64, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"act_layer": QuickGELU},
        {"act_layer": lambda: nn.GELU(approximate="tanh")},
        {"ls_init_value": 0.3},
    ],
    ids=["gelu", "quick gelu", "tanh gelu", "layer scale"],
)
@pytest.mark.parametrize(
    "mask", [None, MASK, MASK.expand(12, 7, 7)], ids=["unmasked", "causal", "one for each head"]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_packed_block_gives_what_the_block_gives(
    options: dict[str, object], mask: Tensor | None, dtype: torch.dtype
) -> None:
    block, x = a_block(dtype, **options), states(dtype)
    assert_close(PackedBlock(block)(x, attn_mask=mask), block(x, attn_mask=mask))


def test_the_last_block_can_give_its_first_token_alone() -> None:
    block, x = a_block(), states()
    assert_close(PackedBlock(block, first_only=True)(x), block(x)[:, :1])


def test_a_block_does_not_change_what_it_is_given() -> None:
    x = states()
    before = x.clone()
    PackedBlock(a_block())(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_a_packed_linear_gives_what_the_linear_gives(bias: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(64, 48, bias=bias).to(dtype)
    packed, given = PackedLinear(linear.weight, linear.bias), states(dtype)
    with torch.no_grad():
        for x in (given, given[0], given[0, 0], given[:0]):
            if x.numel():
                assert_close(packed(x), linear(x))
            else:
                assert packed(x).shape == linear(x).shape


def int8_by_hand(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Row by row and number by number, in float64."""
    x, weight = x.double(), weight.double()
    product = torch.zeros(len(x), len(weight), dtype=torch.float64)
    for i, row in enumerate(x):
        for j, column in enumerate(weight):
            step, other = row.abs().max() / 127, column.abs().max() / 127
            total = int((torch.floor(row / step + 0.5) * torch.round(column / other)).sum())
            product[i, j] = total * step * other
    return product if bias is None else product + bias.double()


@needs_int8
@pytest.mark.parametrize("bias", [True, False])
def test_a_quantized_linear_multiplies_rounded_numbers_exactly(bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(70, 33, bias=bias).requires_grad_(False)
    quantized, x = QuantizedLinear(linear.weight, linear.bias), torch.randn(5, 70)
    expected = int8_by_hand(x, linear.weight, linear.bias)
    torch.testing.assert_close(quantized(x).double(), expected, rtol=1e-5, atol=1e-6)
    residual = torch.randn(5, 33)
    torch.testing.assert_close(quantized.add_to(residual, x), residual + quantized(x))
    torch.testing.assert_close(quantized(x, "gelu", "tanh"), gelu(quantized(x)))
    stacked = quantized(x.reshape(1, 5, 1, 70))
    assert torch.equal(stacked, quantized(x).reshape(1, 5, 1, 33))
    assert quantized(x[:0]).shape == (0, 33)
    assert quantized(x.reshape(1, 5, 70)[:0]).shape == (0, 5, 33)
    torch.testing.assert_close(quantized(x.bfloat16()), quantized(x.bfloat16().float()))
    assert torch.equal(quantized(x[0]), quantized(x)[0])  # alone as beside others


def gelu(x: Tensor) -> Tensor:
    return nn.functional.gelu(x, approximate="tanh")


@needs_int8
@pytest.mark.parametrize("sign", [1, -1])
def test_sums_of_the_largest_int8_products_are_not_cut(sign: int) -> None:
    quantized = QuantizedLinear(torch.full((16, 4096), float(sign)), None)
    torch.testing.assert_close(quantized(torch.ones(2, 4096)), torch.full((2, 16), 4096.0 * sign))


@needs_int8
def test_rows_of_zeros_and_of_no_numbers_are_what_they_are_in_fp32() -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(16, 32), torch.randn(16)
    weight[3] = 0
    x = torch.randn(4, 32)
    x[0] = 0
    x[1, 5], x[2, 5] = float("nan"), float("inf")
    found = QuantizedLinear(weight, bias)(x)
    assert torch.equal(found[0], bias)
    assert not found[1:3].isfinite().any()
    assert torch.equal(found[3], QuantizedLinear(weight, bias)(x[3:])[0])
    assert found[3, 3] == bias[3]


@needs_int8
@pytest.mark.parametrize("mask", [None, MASK], ids=["unmasked", "causal"])
@pytest.mark.parametrize("act", [nn.GELU, QuickGELU])
def test_a_block_in_int8_gives_nearly_what_the_block_gives(
    mask: Tensor | None, act: type[nn.Module]
) -> None:
    block, x = a_block(torch.float32, act_layer=act), states(torch.float32)
    found = PackedBlock(block, linear=QuantizedLinear)(x, attn_mask=mask)
    expected = block(x, attn_mask=mask)
    assert (found - expected).norm() < 0.03 * expected.norm()


@needs_int8
@pytest.mark.parametrize("mask", [None, MASK, MASK.expand(12, 7, 7)])
def test_a_block_in_int8_may_take_its_batch_in_parts(
    mask: Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    block, x = PackedBlock(a_block(torch.float32), linear=QuantizedLinear), states(torch.float32)
    whole = block(x, attn_mask=mask)
    taken: list[int] = []
    forward = block._forward
    monkeypatch.setattr(block, "_forward", lambda x, m: (taken.append(len(x)), forward(x, m))[1])
    # A sample at least; two of three samples of 7 tokens, 256 wide.
    for part, sizes in ((1, [1, 1, 1]), (2 * 7 * 256, [2, 1])):
        monkeypatch.setattr("clipserve.packed._PART", part)
        taken.clear()
        torch.testing.assert_close(block(x, attn_mask=mask), whole)
        assert taken == (sizes if mask is None or mask.dim() == 2 else [3])


@needs_int8
def test_patches_in_int8_are_nearly_what_the_convolution_gives() -> None:
    torch.manual_seed(0)
    convolution = nn.Conv2d(3, 24, 8, stride=8).requires_grad_(False)
    pixels = torch.rand(2, 3, 32, 32)
    expected = convolution(pixels)
    found = PackedPatches(convolution, QuantizedLinear)(pixels)
    assert (found - expected).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize(
    ("capabilities", "is_able"),
    [
        ({"avx512_vnni": True}, True),
        ({"avx_vnni": True}, True),
        ({"amx_int8": True}, True),
        ({"avx512_f": True, "avx2": True}, False),
    ],
)
def test_processors_that_would_cut_sums_of_int8_are_known(
    capabilities: dict[str, bool], is_able: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert multiplies_int8() is is_able


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(32, 32), (32, 48), (35, 47)])
def test_packed_patches_give_what_the_convolution_gives(
    size: tuple[int, int], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    convolution = nn.Conv2d(3, 24, 8, stride=8).to(dtype).requires_grad_(False)
    pixels = torch.rand(2, 3, *size).to(dtype)
    assert_close(PackedPatches(convolution)(pixels), convolution(pixels))


def last_tokens(network: nn.Module) -> int:
    """How many tokens the image tower's last layer gives when it is packed."""
    visual = network.bfloat16().eval().requires_grad_(False).visual
    pack(network)
    x = torch.zeros(2, 5, visual.transformer.width, dtype=torch.bfloat16)
    return int(visual.transformer(x).shape[1])


@pytest.mark.parametrize(
    ("vision", "tokens"),
    [({}, 1), ({"pool_type": "avg"}, 5), ({"attentional_pool": True, "attn_pooler_heads": 2}, 5)],
)
def test_where_only_the_first_token_is_read_the_last_layer_gives_no_others(
    vision: dict[str, Any], tokens: int, architecture: dict[str, Any]
) -> None:
    architecture["vision_cfg"] |= vision
    assert last_tokens(create(architecture).network) == tokens


def test_an_albef_keeps_all_tokens_for_its_fusion_layers(tmp_path: Path) -> None:
    assert last_tokens(tiny_albef(tmp_path).network) == 5


def test_blocks_with_cross_attention_and_overlapping_windows_are_left_alone() -> None:
    block = a_block(is_cross_attention=True)
    convolution = nn.Conv2d(3, 8, 3, stride=2).bfloat16()
    network = nn.Sequential(block, convolution, nn.Linear(4, 4).bfloat16())
    assert pack(network) == []
    assert list(network) == [block, convolution, network[2]]


@pytest.mark.parametrize(
    ("dtype", "least"),
    [("bf16", 0.999), ("fp32", 0.999999), pytest.param("int8", 0.998, marks=needs_int8)],
)
@pytest.mark.parametrize("kind", ["open_clip", "albef", "timm"])
def test_a_packed_model_gives_the_vectors_of_its_fp32_self(
    kind: str, dtype: str, least: float, tiny_model: Model, tmp_path: Path
) -> None:
    if kind == "open_clip":
        model = tiny_model
    else:
        model = tiny_albef(tmp_path, timm_vision() if kind == "timm" else None)
    exact = model.requires_grad_(False).eval()
    pictures, texts = [make_picture(seed=i) for i in range(3)], ["a cat", "two red shoes " * 9]
    expected = exact.embed_images(pictures), exact.embed_texts(texts)
    packed = prepare(copy.deepcopy(model), "cpu", dtype)
    kinds = {type(module) for module in packed.network.modules()}
    assert kinds & {PackedBlock, PackedLinear, QuantizedLinear}
    assert is_quantized(packed.network) == (dtype == "int8")
    found = packed.embed_images(pictures), packed.embed_texts(texts)
    for ours, true in zip(found, expected, strict=True):
        assert (ours * true).sum(axis=1).min() > least


def test_what_was_packed_can_be_put_back() -> None:
    network = nn.Sequential(a_block(), nn.Conv2d(3, 8, 4, stride=4).bfloat16())
    before = list(network)
    replaced = pack(network)
    assert [type(module) for module in network] == [PackedBlock, PackedPatches]
    unpack(replaced)
    assert list(network) == before


def test_a_packed_network_is_never_saved_without_its_weights() -> None:
    network = nn.Sequential(a_block())
    pack(network)
    with pytest.raises(RuntimeError, match="packed for inference cannot be saved"):
        network.state_dict()


def test_a_model_is_prepared_for_a_cpu_once(tiny_model: Model) -> None:
    packed = prepare(copy.deepcopy(tiny_model), "cpu", "fp32")
    with pytest.raises(ValueError, match="load it again"):
        prepare(packed, "cpu", "bf16")


@pytest.mark.parametrize("kind", ["open_clip", "albef", "timm"])
def test_a_network_that_trained_with_activation_checkpoints_is_packed_too(
    kind: str, tiny_model: Model, tmp_path: Path
) -> None:
    model = tiny_model
    if kind != "open_clip":
        model = tiny_albef(tmp_path, timm_vision() if kind == "timm" else None)
    expected = model.eval().embed_texts(["a cat"])
    copied = copy.deepcopy(model)
    copied.network.set_grad_checkpointing()
    found = prepare(copied, "cpu", "fp32").embed_texts(["a cat"])
    assert (found * expected).sum() > 0.999999


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_a_model_that_serves_does_not_lie_in_its_file(
    dtype: str, tiny_model: Model, tmp_path: Path
) -> None:
    checkpoint.save(tiny_model, tmp_path / "model", name="tiny")
    model = clipserve.load(tmp_path / "model", device="cpu", dtype=dtype)
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    assert model.embed_texts(["a cat"]).shape[0] == 1
