"""Networks for inference on a CPU: weights laid out beforehand as its matrix unit reads them.

torch lays a weight out anew in every call, which for a single picture takes as long as the product
itself. oneDNN does it once if asked, and adds biases, GELUs and residuals while it writes the
product out (ViT-B/32, 2-core Xeon; bf16 with AMX: one picture 1.5 times as fast, 32 pictures 1.1
times; fp32 without: a text of 27 tokens 1.3 times, 32 of them or 32 pictures 1.1 times). The
operators are those torch's own compiler uses. Products may also be made in int8, on rounded
numbers. Start at `pack`.

Legend: B batch, T tokens, D width.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# By name, for open_clip and timm are imported in part only, or not at all (towers.py).
_BLOCK = "open_clip.transformer.ResidualAttentionBlock"
_TOWER = "open_clip.transformer.VisionTransformer"
_CLIPS = ("open_clip.model.CLIP", "open_clip.model.CustomTextCLIP")
"""networks that ask their image tower for features, never for the states of its tokens"""
_CALLS_ITS_LINEARS = (
    "clipserve.bert.Attention",
    "clipserve.bert.Mlp",
    "timm.layers.attention.Attention",
    "timm.layers.mlp.Mlp",
)
"""modules that call their `nn.Linear`s and never read the weights themselves"""
_INT8 = ("avx512_vnni", "avx_vnni", "amx_int8")
_PART = 1_250_000
"""numbers of a block's widest states; malloc gives larger ones back to the system each time
(ViT-B/32 in int8, 32 pictures at once: 47 to 58 a second, in parts of this size 73)"""
_ZERO = 128
_SMALLEST = 1e-30
"""largest number of a row that is all but zero"""


class Packed(NamedTuple):
    """A module that was replaced: `setattr(parent, name, original)` puts it back."""

    parent: nn.Module
    name: str
    original: nn.Module


def pack(network: nn.Module, *, int8: bool = False) -> list[Packed]:
    """Replace, in place, what has a packed form; the rest stays as it is.

    The weights are on the CPU already, in bf16 or fp32; the network is not trained any more, and
    cannot be saved or copied: its `state_dict` raises. `int8` rounds weights and what they are
    multiplied with, and takes weights in fp32 and a processor that `multiplies_int8`. Returns what
    was replaced.
    """
    if not torch._C._has_mkldnn:
        return []
    linear = QuantizedLinear if int8 else PackedLinear
    return [_swap(*replacement) for replacement in list(_replacements(network, linear))]


def is_packed(network: nn.Module) -> bool:
    return any(isinstance(module, _Unsaved) for module in network.modules())


def is_quantized(network: nn.Module) -> bool:
    """Whether some of its products are made in int8."""
    return any(isinstance(module, QuantizedLinear) for module in network.modules())


def multiplies_int8() -> bool:
    """Whether the processor adds up int8 products in int32. Without that the sums of two overflow
    int16, and are cut there without a word."""
    known = torch.cpu.get_capabilities()
    return torch._C._has_mkldnn and any(known.get(name) for name in _INT8)


def unpack(replaced: list[Packed]) -> None:
    """Put back what `pack` replaced."""
    for parent, name, original in replaced:
        setattr(parent, name, original)


def _swap(parent: nn.Module, name: str, new: nn.Module) -> Packed:
    original = getattr(parent, name)
    setattr(parent, name, new)
    return Packed(parent, name, original)


def _replacements(
    network: nn.Module, linear: "type[Linear]"
) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    last = _read_for_one_token(network)
    for parent in network.modules():
        for name, child in parent.named_children():
            if _class_of(child) == _BLOCK and not hasattr(child, "ln_1_kv"):
                yield parent, name, PackedBlock(child, first_only=child is last, linear=linear)
            elif type(child) is nn.Linear and _class_of(parent) in _CALLS_ITS_LINEARS:
                yield parent, name, linear(child.weight, child.bias)
            elif type(child) is nn.Conv2d and _is_patches(child):
                yield parent, name, PackedPatches(child, linear)


def _is_patches(convolution: nn.Conv2d) -> bool:
    """Whether its windows neither overlap nor leave gaps."""
    whole = convolution.kernel_size == convolution.stride and convolution.padding == (0, 0)
    return whole and convolution.groups == 1 and convolution.dilation == (1, 1)


def _read_for_one_token(network: Any) -> nn.Module | None:
    """The image tower's last layer, if of its tokens none but the first is looked at."""
    if _class_of(network) not in _CLIPS or _class_of(network.visual) != _TOWER:
        return None
    tower = network.visual
    if tower.pool_type != "tok" or tower.attn_pool is not None or tower.output_tokens:
        return None
    last: nn.Module = tower.transformer.resblocks[-1]
    return last


def _class_of(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


class _Unsaved(nn.Module):
    """Its weights are no tensors that a file could hold."""

    def _save_to_state_dict(self, *arguments: Any) -> None:
        raise RuntimeError("a network packed for inference cannot be saved; use load_for_training")


class PackedLinear(_Unsaved):
    """`nn.Linear` of a weight (out, in) and a bias (out,) or None, of which it keeps a copy."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self._weight: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())
        self._bias = None if bias is None else bias.detach().clone()

    def forward(self, x: Tensor, activation: str = "none", algorithm: str = "") -> Tensor:
        """(..., in) -> (..., out), then the activation."""
        found: Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self._weight, self._bias, activation, [], algorithm
        )
        return found

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """residual (..., out) plus what x (..., in) gives."""
        found: Tensor = torch.ops.mkldnn._linear_pointwise.binary(
            x, residual, self._weight, self._bias, "add"
        )
        return found


class QuantizedLinear(_Unsaved):
    """As PackedLinear, but multiplied in int8.

    Each row of the weight, and each token that comes in, is divided by its largest number and
    rounded to -127..127 (vector-wise quantisation, LLM.int8(), Dettmers et al. 2022, section 3.1,
    without outliers of their own). Sums are exact, and scaled back in fp32. A token with NaN or an
    infinite number in it comes out without a finite one.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        exact = weight.detach().float()
        self._steps = _steps(exact).flatten()  # (out,)
        rounded = (exact / self._steps[:, None]).round_().to(torch.int8)
        self._weight = torch.ops.onednn.qlinear_prepack(rounded, None)
        self._zeros = torch.zeros(len(exact), dtype=torch.int32)
        self._shift = torch.zeros(len(exact)) if bias is None else bias.detach().float().clone()

    def forward(self, x: Tensor, activation: str = "none", algorithm: str = "") -> Tensor:
        """(..., in) -> (..., out), then the activation."""
        product, steps = self._multiply(x)
        found = torch.addcmul(self._shift, product, steps, out=product)
        return F.gelu(found, approximate=algorithm) if activation == "gelu" else found

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """residual (..., out) plus what x (..., in) gives."""
        product, steps = self._multiply(x)
        return torch.addcmul(residual, product, steps).add_(self._shift)

    def _multiply(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (..., in) in its steps times the weight: (..., out), and the steps (..., 1)."""
        x = x.float()  # in bf16 there is no 255.5
        steps = _steps(x)
        # From 1 to 255, as oneDNN's quick product wants it; 128 is zero, and .5 makes it rounding.
        rounded = (x / steps).add_(_ZERO + 0.5).to(torch.uint8)
        product: Tensor = torch.ops.onednn.qlinear_pointwise(
            rounded,
            x_scale=1.0,
            x_zero_point=_ZERO,
            qw=self._weight,
            w_scale=self._steps,
            w_zero_point=self._zeros,
            bias=None,
            output_scale=1.0,
            output_zero_point=0,
            output_dtype=torch.float32,
            post_op_name="none",
            post_op_args=[],
            post_op_algorithm="",
        )
        return product.reshape(*x.shape[:-1], len(self._steps)), steps  # which no rows are not


def _steps(rows: Tensor) -> Tensor:
    """(..., n) -> (..., 1): what each row is divided by so that its largest number is 127."""
    return rows.abs().amax(dim=-1, keepdim=True).clamp_min_(_SMALLEST).div_(127)


Linear = PackedLinear | QuantizedLinear


class PackedPatches(_Unsaved):
    """A convolution that cuts a picture into patches, as the matrix product that it is."""

    def __init__(self, convolution: nn.Conv2d, linear: type[Linear] = PackedLinear) -> None:
        super().__init__()
        self._size = convolution.kernel_size
        self._linear = linear(convolution.weight.flatten(1), convolution.bias)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, D, rows, columns)."""
        height, width = self._size
        rows, columns = pixels.shape[2] // height, pixels.shape[3] // width
        pixels = pixels[:, :, : rows * height, : columns * width]
        parts = pixels.reshape(*pixels.shape[:2], rows, height, columns, width)
        patches = parts.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (B, patches, C*h*w)
        found: Tensor = self._linear(patches).transpose(1, 2)
        return found.reshape(*found.shape[:2], rows, columns)


class PackedBlock(_Unsaved):
    """open_clip's ResidualAttentionBlock over (B, T, D). With `first_only` it gives the first token
    alone, which is all that is looked at behind the last layer."""

    def __init__(
        self, block: Any, *, first_only: bool = False, linear: type[Linear] = PackedLinear
    ) -> None:
        super().__init__()
        attention, mlp = block.attn, block.mlp
        self._first_only = first_only
        self._heads = attention.num_heads
        self._dtype: torch.dtype = mlp.c_fc.weight.dtype
        self._ln_1, self._ln_2 = block.ln_1, block.ln_2
        self._scale_1, self._scale_2 = block.ls_1, block.ls_2
        self._qkv = linear(attention.in_proj_weight, attention.in_proj_bias)
        self._out = linear(attention.out_proj.weight, attention.out_proj.bias)
        self._up = linear(mlp.c_fc.weight, mlp.c_fc.bias)
        self._down = linear(mlp.c_proj.weight, mlp.c_proj.bias)
        self._activation = mlp.gelu
        self._fused = _fused(mlp.gelu)
        self._in_parts = linear is QuantizedLinear
        self._width = len(mlp.c_fc.weight)

    def get_weight_dtype(self) -> torch.dtype:
        """open_clip asks its first block, to cast what goes in."""
        return self._dtype

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """(B, T, D) -> (B, T, D), or (B, 1, D). attn_mask (T, T), or one (B * heads, T, T)
        for each, is added to the logits."""
        size = max(1, _PART // (x.shape[1] * self._width))
        has_own_masks = attn_mask is not None and attn_mask.dim() == 3
        if size >= len(x) or not self._in_parts or has_own_masks:
            return self._forward(x, attn_mask)
        return torch.cat([self._forward(part, attn_mask) for part in torch.split(x, size)])

    def _forward(self, x: Tensor, attn_mask: Tensor | None) -> Tensor:
        heads: Tensor = self._qkv(self._ln_1(x))
        heads = heads.reshape(*x.shape[:2], 3, self._heads, -1)
        query, key, value = heads.permute(2, 0, 3, 1, 4)  # (B, heads, T, D / heads) each
        if self._first_only:
            x, query = x[:, :1], query[:, :, :1]
        mask = None if attn_mask is None else attn_mask.to(x.dtype)
        if mask is not None and mask.dim() == 3:
            mask = mask.reshape(len(x), self._heads, *mask.shape[1:])
        found = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        x = self._add(x, self._out, found.transpose(1, 2).flatten(2), self._scale_1)
        inner = self._ln_2(x)
        inner = self._up(inner, *self._fused) if self._fused else self._activation(self._up(inner))
        return self._add(x, self._down, inner, self._scale_2)

    def _add(self, x: Tensor, linear: Linear, y: Tensor, scale: nn.Module) -> Tensor:
        if isinstance(scale, nn.Identity):
            return linear.add_to(x, y)
        scaled: Tensor = scale(linear(y))
        return x + scaled


def _fused(activation: nn.Module) -> tuple[str, str] | None:
    """oneDNN's name of it, if it is one that can be done in the product."""
    return ("gelu", activation.approximate) if type(activation) is nn.GELU else None
