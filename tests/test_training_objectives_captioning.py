import math

import pytest
import torch
from torch import Tensor

from training.objectives.captioning import caption_tokens, captioning_loss

PAD = 0


def captions(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits (4, 6, 9) of captions of 6, 3, 1 and no words."""
    random = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(4, 6, 9, generator=random)
    targets = torch.randint(1, 9, (4, 6), generator=random)
    for row, words in enumerate((6, 3, 1, 0)):
        targets[row, words:] = PAD
    return logits.requires_grad_(), targets


def naive(logits: Tensor, targets: Tensor) -> Tensor:
    total, words = torch.zeros((), dtype=torch.float64), 0
    for row, ids in zip(logits, targets.tolist(), strict=True):
        for position, word in enumerate(ids):
            if word != PAD:
                total = total - torch.log(row[position, word].exp() / row[position].exp().sum())
                words += 1
    return total / words


def test_value_and_gradient_equal_a_float64_restatement() -> None:
    logits, targets = captions()
    exact = logits.detach().double().requires_grad_()
    value = captioning_loss(logits, targets, PAD, caption_tokens(targets, PAD))
    expected = naive(exact, targets)
    assert value.item() == pytest.approx(expected.item(), abs=1e-6)
    (gradient,) = torch.autograd.grad(value, logits)
    (expected_gradient,) = torch.autograd.grad(expected, exact)
    assert torch.allclose(gradient.double(), expected_gradient, atol=1e-5)
    assert not gradient[3].any()


def test_two_words_by_hand() -> None:
    # The first is right by a logit of 2 against two of 0, the second is anyone's guess of three.
    logits = torch.tensor([[[0.0, 2.0, 0.0], [7.0, 7.0, 7.0], [5.0, 0.0, 0.0]]])
    targets = torch.tensor([[1, 2, PAD]])
    expected = (-math.log(math.exp(2) / (math.exp(2) + 2)) + math.log(3)) / 2
    assert captioning_loss(logits, targets, PAD, 2).item() == pytest.approx(expected)


def test_value_and_gradient_equal_open_clips() -> None:
    from open_clip.loss import CoCaLoss

    (ours, targets), (theirs, _) = captions(), captions()
    value = captioning_loss(ours, targets, PAD, caption_tokens(targets, PAD))
    loss = CoCaLoss(caption_loss_weight=1.0, clip_loss_weight=0.0, pad_id=PAD)
    _, expected = loss(None, None, theirs, targets, None)
    assert value.item() == pytest.approx(expected.item(), abs=1e-6)
    (gradient,) = torch.autograd.grad(value, ours)
    (expected_gradient,) = torch.autograd.grad(expected, theirs)
    assert torch.allclose(gradient, expected_gradient, atol=1e-5)


def test_words_are_counted_without_padding() -> None:
    assert caption_tokens(captions()[1], PAD) == 10
    assert caption_tokens(torch.tensor([[3, 5, 5]]), pad_id=5) == 1


@pytest.mark.parametrize("counts", [[1, 3], [1, 0, 2, 1]])
def test_shares_of_ranks_add_up_to_the_whole(counts: list[int]) -> None:
    logits, targets = captions()
    total = caption_tokens(targets, PAD)
    whole = captioning_loss(logits, targets, PAD, total)
    (gradient,) = torch.autograd.grad(whole, logits)
    parts = zip(logits.split(counts), targets.split(counts), strict=True)  # type: ignore[no-untyped-call]
    shares = torch.stack([captioning_loss(part, ids, PAD, total) for part, ids in parts])
    assert shares.sum().item() == pytest.approx(whole.item(), abs=1e-6)
    (summed,) = torch.autograd.grad(shares.sum(), logits)
    assert torch.allclose(summed, gradient, atol=1e-6)


@pytest.mark.parametrize("rows", [0, 2])
def test_without_words_the_loss_is_nothing_but_can_be_differentiated(rows: int) -> None:
    logits = torch.randn(rows, 6, 9, requires_grad=True)
    value = captioning_loss(logits, torch.zeros(rows, 6, dtype=torch.long), PAD, 0)
    assert value.item() == 0
    value.backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    assert not logits.grad.any()


def test_computes_in_float32_under_autocast() -> None:
    logits, targets = captions()
    rough = logits.detach().bfloat16()
    exact = captioning_loss(rough.float(), targets, PAD, 10)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(captioning_loss(rough, targets, PAD, 10), exact)
