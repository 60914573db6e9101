import math

import pytest
import torch
import torch.nn.functional as F
from test_training_objectives_contrastive import (
    Watch,
    check_same,
    several_positives,
    value_and_gradients,
)
from torch import Tensor

from training.objectives.sigmoid import sigmoid_loss, sigmoid_ring_loss

CHUNKS = [None, 1, 4, 1000]
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def features(
    batch: int, width: int, seed: int = 0, scale: float = 10, dtype: torch.dtype = torch.float32
) -> Inputs:
    random = torch.Generator().manual_seed(seed)
    drawn = (torch.randn(batch, width, generator=random, dtype=dtype) for _ in "it")
    image, text = (F.normalize(rows, dim=1).requires_grad_() for rows in drawn)
    steep, bias = (torch.tensor(x, dtype=dtype, requires_grad=True) for x in (scale, -3.0))
    return image, text, steep, bias


def naive(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, groups: Tensor | None = None
) -> Tensor:
    """The equation of SigLIP's section 3.1, one pair at a time."""
    count = len(image)
    if groups is None:
        groups = torch.arange(count)[:, None]
    total = torch.zeros((), dtype=image.dtype)
    for i in range(count):
        for j in range(count):
            label = 1 if bool((groups[i] == groups[j]).any()) else -1
            logit = label * (scale * (image[i] * text[j]).sum() + bias)
            total = total + (1 / (1 + (-logit).exp())).log()
    return -total / count


@pytest.mark.parametrize("chunk_size", CHUNKS)
def test_three_pairs_by_hand(chunk_size: int | None) -> None:
    eye = torch.eye(3)
    loss = sigmoid_loss(eye, eye, torch.tensor(2.0), torch.tensor(-1.0), chunk_size=chunk_size)
    # A row has one positive of logit 2 - 1, and two negatives of logit -1: all three are right
    # by 1, which costs log(1 + e^-1) each.
    assert loss.item() == pytest.approx(3 * math.log(1 + math.exp(-1)))


@pytest.mark.parametrize("chunk_size", CHUNKS)
def test_two_captions_of_one_picture_by_hand(chunk_size: int | None) -> None:
    eye, groups = torch.eye(3), torch.tensor([[7], [7], [8]])
    loss = sigmoid_loss(
        eye, eye, torch.tensor(2.0), torch.tensor(-1.0), groups=groups, chunk_size=chunk_size
    )
    # The two pairs of row 0 with text 1 and of row 1 with text 0 are now positives of logit -1.
    right, wrong = math.log(1 + math.exp(-1)), math.log(1 + math.exp(1))
    assert loss.item() == pytest.approx((7 * right + 2 * wrong) / 3)


@pytest.mark.parametrize("chunk_size", CHUNKS)
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(("batch", "width"), [(1, 2), (13, 8)])
def test_value_and_gradients_equal_a_float64_restatement(
    batch: int, width: int, grouped: bool, chunk_size: int | None
) -> None:
    groups = several_positives(batch) if grouped else None
    exact = features(batch, width, seed=batch, dtype=torch.float64)
    expected = value_and_gradients(naive(*exact, groups), exact)
    image, text, scale, bias = (tensor.detach().float().requires_grad_() for tensor in exact)
    loss = sigmoid_loss(image, text, scale, bias, groups=groups, chunk_size=chunk_size)
    found = value_and_gradients(loss, (image, text, scale, bias))
    check_same(found, expected, value=1e-6, gradient=1e-5)


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_gradients_equal_finite_differences(chunk_size: int | None) -> None:
    def loss(*inputs: Tensor) -> Tensor:
        return sigmoid_loss(*inputs, own=slice(1, 4), chunk_size=chunk_size)

    assert torch.autograd.gradcheck(loss, features(5, 3, dtype=torch.float64))


@pytest.mark.parametrize("chunk_size", [None, 4])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("bounds", [[0, 13], [0, 5, 13], [0, 4, 4, 5, 13]])
def test_shares_of_the_rows_add_up_to_the_loss(
    bounds: list[int], grouped: bool, chunk_size: int | None
) -> None:
    inputs = features(13, 8)
    groups = several_positives(13) if grouped else None
    whole = value_and_gradients(sigmoid_loss(*inputs, groups=groups), inputs)
    shares = [
        value_and_gradients(
            sigmoid_loss(*inputs, own=slice(a, b), groups=groups, chunk_size=chunk_size), inputs
        )
        for a, b in zip(bounds, bounds[1:], strict=False)
    ]
    summed = [torch.stack(parts).sum(dim=0) for parts in zip(*shares, strict=True)]
    check_same(summed, whole, value=1e-6, gradient=1e-6)


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_blocks_of_texts_may_come_in_any_order(chunk_size: int | None) -> None:
    image, text, scale, bias = inputs = features(13, 8)
    own, groups = slice(5, 9), several_positives(13)
    places = [slice(9, 13), slice(0, 5), slice(5, 5), slice(5, 9)]
    found = sigmoid_ring_loss(
        image[own],
        [(place, text[place]) for place in places],
        scale,
        bias,
        own=own,
        total=13,
        groups=groups,
        chunk_size=chunk_size,
    )
    expected = sigmoid_loss(*inputs, own=own, groups=groups)
    check_same(
        value_and_gradients(found, inputs), value_and_gradients(expected, inputs), 1e-6, 1e-6
    )


@pytest.mark.parametrize("chunk_size", CHUNKS)
def test_value_and_gradients_equal_open_clips(chunk_size: int | None) -> None:
    from open_clip.loss import SigLipLoss

    inputs = features(32, 16, seed=2)
    expected = value_and_gradients(SigLipLoss()(*inputs), inputs)
    found = value_and_gradients(sigmoid_loss(*inputs, chunk_size=chunk_size), inputs)
    check_same(found, expected, value=1e-6, gradient=1e-5)


@pytest.mark.parametrize("chunk_size", [None, 4])
@pytest.mark.parametrize("kind", ["random", "same", "opposite"])
def test_bf16_features_at_scale_100_give_finite_gradients(
    kind: str, chunk_size: int | None
) -> None:
    random, other, *_ = features(9, 8, seed=4)
    text = {"random": other, "same": random, "opposite": -random}[kind]
    image, text = (t.detach().bfloat16().requires_grad_() for t in (random, text))
    scale, bias = (torch.tensor(x, requires_grad=True) for x in (100.0, -10.0))
    inputs = (image, text, scale, bias)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = sigmoid_loss(*inputs, chunk_size=chunk_size)
    found = value_and_gradients(loss, inputs)
    assert [tensor.dtype for tensor in found[:3]] == [torch.float32, *[torch.bfloat16] * 2]
    assert all(tensor.isfinite().all() for tensor in found)
    exact = naive(*(tensor.double() for tensor in inputs))
    assert found[0].item() == pytest.approx(exact.item(), rel=1e-5)


def test_chunks_hold_no_square() -> None:
    inputs = features(256, 4)
    with Watch() as watch:
        loss = sigmoid_loss(*inputs, chunk_size=8)
        torch.autograd.grad(loss, inputs)
    assert watch.largest == 256 * 8


def test_chunks_keep_no_logits_for_the_backward() -> None:
    inputs = features(256, 4)
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        sigmoid_loss(*inputs, chunk_size=8)
    assert max(kept) <= 256 * 4
