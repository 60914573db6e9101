import math

import pytest
import torch
from torch import Tensor
from torch.autograd import backward

from training.objectives.masked_language import mask_tokens, masked_language_loss

PAD, UNKNOWN, START, END, MASK = SPECIAL = (0, 1, 2, 3, 4)
VOCABULARY = 50


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def texts(rows: int, length: int, seed: int = 0) -> Tensor:
    """[CLS] words [SEP] padding, of different lengths."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, VOCABULARY, (rows, length), generator=random)
    ids[:, 0] = START
    for row, end in enumerate(torch.randint(2, length, (rows,), generator=random).tolist()):
        ids[row, end], ids[row, end + 1 :] = END, PAD
    return ids


def mask(ids: Tensor, noise: Tensor, probability: float = 0.15) -> tuple[Tensor, Tensor]:
    return mask_tokens(ids, SPECIAL, MASK, VOCABULARY, noise, probability)


def test_a_text_by_hand() -> None:
    ids = torch.tensor([[START, 10, 11, 12, 13, END, PAD]])
    noise = torch.tensor(
        [
            [0.0, 0.0, 0.0],  # special: never
            [0.1, 0.79, 0.0],  # masked
            [0.1, 0.81, 0.0],  # the first ordinary token, which is 5
            [0.1, 0.91, 0.0],  # chosen, and kept
            [0.2, 0.0, 0.0],  # not chosen
            [0.0, 0.0, 0.0],
            [0.0, 0.0, 0.0],
        ]
    )[None]
    masked, chosen = mask(ids, noise)
    assert masked.tolist() == [[START, MASK, 5, 12, 13, END, PAD]]
    assert chosen.tolist() == [[False, True, True, True, False, False, False]]


def test_fifteen_percent_are_chosen_and_split_80_10_10() -> None:
    ids = texts(4000, 20)
    masked, chosen = mask(ids, uniform(4000, 20, 3))
    words = ~torch.isin(ids, torch.tensor(SPECIAL))
    count = int(chosen.sum())
    assert count / int(words.sum()) == pytest.approx(0.15, abs=0.006)
    is_mask, is_kept = (masked == MASK) & chosen, (masked == ids) & chosen
    assert int(is_mask.sum()) / count == pytest.approx(0.8, abs=0.02)
    # A random token is the one that stood there once in 45 times.
    assert int(is_kept.sum()) / count == pytest.approx(0.1 + 0.1 / 45, abs=0.015)


def test_special_tokens_are_neither_masked_nor_written() -> None:
    ids = texts(500, 20)
    masked, chosen = mask(ids, uniform(500, 20, 3), probability=1.0)
    special = torch.isin(ids, torch.tensor(SPECIAL))
    assert torch.equal(chosen, ~special)
    assert torch.equal(masked[special], ids[special])
    written = masked[chosen & (masked != MASK)]
    assert not torch.isin(written, torch.tensor(SPECIAL)).any()


@pytest.mark.parametrize("special", [(0, 1, 2), (7, 9), (3, 6, 8), (9,)])
def test_replacements_are_all_ordinary_tokens_equally(special: tuple[int, ...]) -> None:
    """Wherever in the vocabulary its special tokens are."""
    ordinary = [number for number in range(10) if number not in special]
    token = torch.arange(len(ordinary) * 100) / (len(ordinary) * 100) + 1e-4
    noise = torch.stack([torch.zeros_like(token), torch.full_like(token, 0.85), token], dim=1)
    ids = torch.full((1, len(token)), ordinary[0])
    masked, _ = mask_tokens(ids, special, special[0], 10, noise[None])
    counts = masked.flatten().bincount(minlength=10).tolist()
    assert counts == [100 if number in ordinary else 0 for number in range(10)]


def test_noise_of_one_writes_the_last_token() -> None:
    ids, noise = torch.tensor([[10]]), torch.tensor([[[0.0, 0.85, 1.0]]])
    assert mask(ids, noise)[0].item() == VOCABULARY - 1


def test_a_row_is_masked_the_same_in_any_company() -> None:
    ids, noise = texts(6, 12), uniform(6, 12, 3)
    whole = mask(ids, noise)
    parts = [mask(ids[s], noise[s]) for s in (slice(2), slice(2, 6))]
    for one, other in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.equal(torch.cat(other), one)


def test_the_texts_themselves_stay_as_they_are() -> None:
    ids = texts(50, 20)
    before = ids.clone()
    mask(ids, uniform(50, 20, 3))
    assert torch.equal(ids, before)


def test_no_texts_are_masked_to_no_texts() -> None:
    masked, chosen = mask(torch.zeros(0, 7, dtype=torch.int64), uniform(0, 7, 3))
    assert masked.shape == chosen.shape == (0, 7)


def naive(logits: Tensor, targets: Tensor, teacher: Tensor | None, alpha: float) -> Tensor:
    """ALBEF's equation 7 as its code has it, in float64, one number at a time."""
    total = torch.zeros((), dtype=torch.float64)
    for i, row in enumerate(logits):
        denominator = sum(torch.exp(value) for value in row)
        total = total - (1 - alpha) * torch.log(torch.exp(row[int(targets[i])]) / denominator)
        if teacher is not None:
            weights = [math.exp(value) for value in teacher[i].tolist()]
            for weight, value in zip(weights, row, strict=True):
                total = total - alpha * weight / sum(weights) * torch.log(
                    torch.exp(value) / denominator
                )
    return total / len(logits)


def test_one_masked_word_by_hand() -> None:
    logits = torch.tensor([[math.log(2), 0.0, 0.0]])  # probabilities 1/2, 1/4, 1/4
    targets = torch.tensor([1])
    assert masked_language_loss(logits, targets, 1).item() == pytest.approx(math.log(4))
    sure = torch.tensor([[50.0, 0.0, 0.0]])  # the twin says 0
    found = masked_language_loss(logits, targets, 1, sure, alpha=0.25)
    assert found.item() == pytest.approx(0.75 * math.log(4) + 0.25 * math.log(2))


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_value_and_gradient_equal_a_float64_restatement(alpha: float) -> None:
    logits = (uniform(6, 9) * 10).requires_grad_()
    exact = logits.detach().double().requires_grad_()
    targets = torch.arange(6) + 2
    teacher = (uniform(6, 9, seed=1) * 10).requires_grad_()
    loss = masked_language_loss(logits, targets, 6, teacher, alpha)
    expected = naive(exact, targets, teacher.detach().double(), alpha)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    backward(loss)
    backward(expected)
    assert logits.grad is not None
    assert exact.grad is not None
    assert torch.allclose(logits.grad.double(), exact.grad, atol=1e-5)
    assert teacher.grad is None


def test_shares_add_up_and_a_rank_without_masks_adds_nothing() -> None:
    logits, teacher, targets = uniform(7, 9), uniform(7, 9, seed=1), torch.arange(7)
    logits.requires_grad_()
    whole = masked_language_loss(logits, targets, 7, teacher, 0.4)
    bounds = (0, 4, 4, 7)
    shares = [
        masked_language_loss(logits[a:b], targets[a:b], 7, teacher[a:b], 0.4)
        for a, b in zip(bounds, bounds[1:], strict=False)
    ]
    assert shares[1].item() == 0
    assert shares[1].requires_grad
    assert sum(s.item() for s in shares) == pytest.approx(whole.item())


def test_no_mask_anywhere_is_zero_with_a_graph() -> None:
    logits = torch.zeros(0, 9, requires_grad=True)
    loss = masked_language_loss(logits, torch.zeros(0, dtype=torch.int64), 0, logits, 0.4)
    backward(loss)
    assert loss.item() == 0
    assert logits.grad is not None


def test_bf16_logits_are_compared_in_float32() -> None:
    logits, teacher = ((uniform(5, 9, seed=s) * 20).bfloat16() for s in range(2))
    targets = torch.arange(5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = masked_language_loss(logits, targets, 5, teacher, 0.4)
    exact = masked_language_loss(logits.float(), targets, 5, teacher.float(), 0.4)
    assert torch.equal(found, exact)
