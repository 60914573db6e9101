import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from training.objectives.contrastive import contrastive_loss

TILES = [None, 1, 4, 1000]


def features(
    batch: int, width: int, seed: int = 0, scale: float = 14.3, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    drawn = (torch.randn(batch, width, generator=random, dtype=dtype) for _ in "it")
    image, text = (F.normalize(rows, dim=1).requires_grad_() for rows in drawn)
    return image, text, torch.tensor(scale, dtype=dtype, requires_grad=True)


def naive(image: Tensor, text: Tensor, scale: Tensor, groups: Tensor | None = None) -> Tensor:
    """The equation of training/objectives/contrastive.py, one number at a time."""
    count = len(image)
    if groups is None:
        groups = torch.arange(count)[:, None]
    z = [[scale * (image[i] * text[j]).sum() for j in range(count)] for i in range(count)]
    total = torch.zeros((), dtype=image.dtype)
    for i in range(count):
        positives = [j for j in range(count) if bool((groups[i] == groups[j]).any())]
        row, column = [z[i][j] for j in range(count)], [z[j][i] for j in range(count)]
        for logits in (row, column):
            total = total + torch.stack([logit.exp() for logit in logits]).sum().log()
            total = total - torch.stack([logits[j] for j in positives]).mean()
    return total / (2 * count)


def several_positives(batch: int) -> Tensor:
    """Picture and caption ids (N, 2): every third row shares a picture, neighbours a caption."""
    rows = torch.arange(batch)
    return torch.stack([rows % 3, 100 + rows // 2], dim=1)


def value_and_gradients(loss: Tensor, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, inputs)]


def check_same(found: list[Tensor], expected: list[Tensor], value: float, gradient: float) -> None:
    """Values to `value`, gradients to `gradient`; both of their size where that is above 1."""
    tolerances = [value, *[gradient] * (len(found) - 1)]
    for one, other, tolerance in zip(found, expected, tolerances, strict=True):
        largest = max(1.0, other.abs().max().item())
        assert (one.double() - other.double()).abs().max().item() <= tolerance * largest


@pytest.mark.parametrize("tile_size", TILES)
def test_three_pairs_by_hand(tile_size: int | None) -> None:
    eye = torch.eye(3)
    # Each row has one logit of 2 and two of 0: -log(e^2 / (e^2 + 2)).
    expected = -math.log(math.exp(2) / (math.exp(2) + 2))
    loss = contrastive_loss(eye, eye, torch.tensor(2.0), tile_size=tile_size)
    assert loss.item() == pytest.approx(expected)


@pytest.mark.parametrize("tile_size", TILES)
def test_two_captions_of_one_picture_by_hand(tile_size: int | None) -> None:
    # Rows 0 and 1 share a picture: the target of both is half 2 (itself), half 0 (the other).
    eye, groups = torch.eye(3), torch.tensor([[7], [7], [8]])
    log_sum = math.log(math.exp(2) + 2)
    expected = (2 * (log_sum - 1) + (log_sum - 2)) / 3
    loss = contrastive_loss(eye, eye, torch.tensor(2.0), groups=groups, tile_size=tile_size)
    assert loss.item() == pytest.approx(expected)


@pytest.mark.parametrize("tile_size", TILES)
def test_no_information_costs_ln_of_the_batch(tile_size: int | None) -> None:
    same = F.normalize(torch.ones(17, 4), dim=1)
    loss = contrastive_loss(same, same, torch.tensor(50.0), tile_size=tile_size)
    assert loss.item() == pytest.approx(math.log(17))


@pytest.mark.parametrize("tile_size", TILES)
def test_one_pair_costs_nothing_and_pulls_nowhere(tile_size: int | None) -> None:
    inputs = features(1, 8, scale=100)
    for found in value_and_gradients(contrastive_loss(*inputs, tile_size=tile_size), inputs):
        assert found.abs().max() < 1e-5


@pytest.mark.parametrize("tile_size", TILES)
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(("batch", "width"), [(2, 3), (13, 8)])
def test_value_and_gradients_equal_a_float64_restatement(
    batch: int, width: int, grouped: bool, tile_size: int | None
) -> None:
    groups = several_positives(batch) if grouped else None
    exact = features(batch, width, seed=batch, dtype=torch.float64)
    expected = value_and_gradients(naive(*exact, groups), exact)
    ours = tuple(tensor.detach().float().requires_grad_() for tensor in exact)
    loss = contrastive_loss(*ours, groups=groups, tile_size=tile_size)
    check_same(value_and_gradients(loss, ours), expected, value=1e-6, gradient=1e-5)


@pytest.mark.parametrize("tile_size", TILES)
def test_float64_features_keep_their_precision(tile_size: int | None) -> None:
    inputs = features(6, 4, dtype=torch.float64)
    expected = value_and_gradients(naive(*inputs), inputs)
    loss = contrastive_loss(*inputs, tile_size=tile_size)
    check_same(value_and_gradients(loss, inputs), expected, value=1e-13, gradient=1e-12)


@pytest.mark.parametrize("own", [None, slice(1, 4)])
def test_the_tiles_gradients_equal_finite_differences(own: slice | None) -> None:
    def loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        return contrastive_loss(image, text, scale, own=own, tile_size=2)

    assert torch.autograd.gradcheck(loss, features(5, 3, dtype=torch.float64))


@pytest.mark.parametrize("scale", [14.3, 100])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(
    ("batch", "width", "tile_size"),
    [(64, 32, 16), (65, 33, 16), (130, 7, 64), (5, 3, 100), (33, 1, 32)],
)
def test_tiles_equal_dense(
    batch: int, width: int, tile_size: int, grouped: bool, scale: float
) -> None:
    groups = several_positives(batch) if grouped else None
    inputs = features(batch, width, scale=scale)
    found = contrastive_loss(*inputs, groups=groups, tile_size=tile_size)
    expected = contrastive_loss(*inputs, groups=groups)
    check_same(
        value_and_gradients(found, inputs), value_and_gradients(expected, inputs), 1e-5, 1e-5
    )


@pytest.mark.parametrize("tile_size", [None, 4])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("bounds", [[0, 13], [0, 5, 13], [0, 4, 4, 5, 13]])
def test_shares_of_the_rows_add_up_to_the_loss(
    bounds: list[int], grouped: bool, tile_size: int | None
) -> None:
    inputs = features(13, 8)
    groups = several_positives(13) if grouped else None
    whole = value_and_gradients(contrastive_loss(*inputs, groups=groups), inputs)
    shares = [
        value_and_gradients(
            contrastive_loss(*inputs, own=slice(a, b), groups=groups, tile_size=tile_size), inputs
        )
        for a, b in zip(bounds, bounds[1:], strict=False)
    ]
    summed = [torch.stack(parts).sum(dim=0) for parts in zip(*shares, strict=True)]
    check_same(summed, whole, value=1e-6, gradient=1e-6)


@pytest.mark.parametrize("tile_size", TILES)
def test_value_and_gradients_equal_open_clips(tile_size: int | None) -> None:
    from open_clip import ClipLoss

    inputs = features(32, 16, seed=2)
    expected = value_and_gradients(ClipLoss()(*inputs), inputs)
    found = value_and_gradients(contrastive_loss(*inputs, tile_size=tile_size), inputs)
    check_same(found, expected, value=1e-6, gradient=1e-5)


@pytest.mark.parametrize("tile_size", [None, 16])
def test_logits_are_float32_under_autocast(tile_size: int | None) -> None:
    image, text, _ = features(64, 32, seed=3)
    steep = torch.tensor(100.0)
    exact = contrastive_loss(image, text, steep, tile_size=tile_size)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(contrastive_loss(image, text, steep, tile_size=tile_size), exact)


@pytest.mark.parametrize("tile_size", [None, 4])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("kind", ["random", "same", "opposite"])
def test_bf16_features_at_scale_100_give_finite_gradients(
    kind: str, grouped: bool, tile_size: int | None
) -> None:
    random, other, _ = features(9, 8, seed=4)
    text = {"random": other, "same": random, "opposite": -random}[kind]
    image, text = (t.detach().bfloat16().requires_grad_() for t in (random, text))
    scale = torch.tensor(100.0, requires_grad=True)
    groups = several_positives(9) if grouped else None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = contrastive_loss(image, text, scale, groups=groups, tile_size=tile_size)
    found = value_and_gradients(loss, (image, text, scale))
    assert [tensor.dtype for tensor in found[:3]] == [torch.float32, *[torch.bfloat16] * 2]
    assert all(tensor.isfinite().all() for tensor in found)
    exact = naive(image.double(), text.double(), scale.double(), groups)
    assert found[0].item() == pytest.approx(exact.item(), abs=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("tile_size", [None, 64])
def test_the_gpu_agrees_with_the_cpu(tile_size: int | None) -> None:
    inputs, groups = features(130, 32, scale=100), several_positives(130)
    there = tuple(tensor.detach().cuda().requires_grad_() for tensor in inputs)
    found = contrastive_loss(*there, groups=groups.cuda(), tile_size=tile_size)
    expected = contrastive_loss(*inputs, groups=groups)
    on_cpu = [tensor.cpu() for tensor in value_and_gradients(found, there)]
    check_same(on_cpu, value_and_gradients(expected, inputs), 1e-5, 1e-5)


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts matrix products, and the numbers in the largest tensor that was made."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.products = self.largest = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm_.default):
            self.products += 1
        if isinstance(result, Tensor):
            self.largest = max(self.largest, result.numel())
        return result


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("own", [None, slice(0, 128)])
def test_tiles_hold_no_square_and_share_their_products(own: slice | None, grouped: bool) -> None:
    inputs = features(256, 4)
    groups = several_positives(256) if grouped else None
    tiles = (256 // 32) ** 2  # half of the rows, each way by itself, are as many
    with Watch() as forward:
        loss = contrastive_loss(*inputs, own=own, groups=groups, tile_size=32)
    assert forward.products == tiles
    with Watch() as backward:
        torch.autograd.grad(loss, inputs)
    assert backward.products == 3 * tiles
    # A tile, or the features with a count beside them.
    assert max(forward.largest, backward.largest) <= max(32 * 32, 256 * (4 + 1))
