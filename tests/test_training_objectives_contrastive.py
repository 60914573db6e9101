import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from training.objectives.contrastive import contrastive_loss


def features(batch: int, width: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    image, text = (F.normalize(torch.randn(batch, width, generator=random), dim=1) for _ in "it")
    return image.requires_grad_(), text.requires_grad_(), torch.tensor(14.3, requires_grad=True)


def naive(image: np.ndarray, text: np.ndarray, scale: float) -> float:
    """CLIP's figure 3 in float64, one row and one column at a time."""
    logits = scale * image.astype(np.float64) @ text.astype(np.float64).T
    total = 0.0
    for i in range(len(logits)):
        total -= logits[i, i] - math.log(sum(math.exp(value) for value in logits[i, :]))
        total -= logits[i, i] - math.log(sum(math.exp(value) for value in logits[:, i]))
    return total / (2 * len(logits))


def test_three_pairs_by_hand() -> None:
    eye = torch.eye(3)
    # Each row has one logit of 2 and two of 0: -log(e^2 / (e^2 + 2)).
    expected = -math.log(math.exp(2) / (math.exp(2) + 2))
    assert contrastive_loss(eye, eye, torch.tensor(2.0)).item() == pytest.approx(expected)


def test_no_information_costs_ln_of_the_batch() -> None:
    same = F.normalize(torch.ones(17, 4), dim=1)
    assert contrastive_loss(same, same, torch.tensor(50.0)).item() == pytest.approx(math.log(17))


@pytest.mark.parametrize(("batch", "width"), [(2, 3), (16, 8), (65, 32)])
def test_value_equals_a_float64_restatement(batch: int, width: int) -> None:
    image, text, scale = features(batch, width, seed=batch)
    expected = naive(image.detach().numpy(), text.detach().numpy(), scale.item())
    assert contrastive_loss(image, text, scale).item() == pytest.approx(expected, abs=1e-6)


def test_gradients_equal_finite_differences() -> None:
    image, text, scale = (tensor.detach().double() for tensor in features(5, 4, seed=1))
    inputs = [tensor.requires_grad_() for tensor in (image, text, scale)]

    def loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        logits = scale * image @ text.T
        targets = torch.arange(len(logits))
        return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2

    assert torch.autograd.gradcheck(loss, inputs)
    expected = torch.autograd.grad(loss(*inputs), inputs)
    ours = [tensor.detach().float().requires_grad_() for tensor in inputs]
    found = torch.autograd.grad(contrastive_loss(ours[0], ours[1], ours[2]), ours)
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one.double(), other, atol=1e-5)


def test_value_and_gradients_equal_open_clips() -> None:
    from open_clip import ClipLoss

    ours, theirs = features(32, 16, seed=2), features(32, 16, seed=2)
    value = contrastive_loss(*ours)
    expected = ClipLoss()(*theirs)
    assert value.item() == pytest.approx(expected.item(), abs=1e-6)
    value.backward()
    expected.backward()
    for one, other in zip(ours, theirs, strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert torch.allclose(one.grad, other.grad, atol=1e-5)


def test_logits_are_float32_under_autocast() -> None:
    image, text, scale = features(64, 32, seed=3)
    steep = torch.tensor(100.0)
    exact = contrastive_loss(image, text, steep)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(contrastive_loss(image, text, steep), exact)
    assert scale.requires_grad
