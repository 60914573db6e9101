import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.autograd import backward

from training.objectives.matching import count_right, draw_negatives, matching_loss


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def test_draws_follow_the_softmax_over_the_allowed() -> None:
    draws = 40_000
    similarity = torch.tensor([2.0, 0.0, 1.0, -1.0, 1.5])
    allowed = torch.tensor([True, True, False, True, True])
    weights = [math.exp(s) * a for s, a in zip(similarity.tolist(), allowed.tolist(), strict=True)]
    index, found = draw_negatives(
        similarity.expand(draws, 5), allowed.expand(draws, 5), uniform(draws, 5)
    )
    assert found.all()
    counts = index.bincount(minlength=5).tolist()
    expected = [draws * weight / sum(weights) for weight in weights]
    assert counts[2] == 0
    chi_square = sum((c - e) ** 2 / e for c, e in zip(counts, expected, strict=True) if e)
    assert chi_square < 11.3  # 1 % of fair samplers exceed it at three degrees of freedom


def test_a_draw_by_hand() -> None:
    # Equal noise is equal Gumbel noise: the most similar allowed key wins, whatever its lead.
    similarity = torch.tensor([[3.0, 1.0, 2.0], [3.0, 1.0, 1.1], [0.0, 0.0, 0.0]])
    allowed = torch.tensor([[False, True, True], [True, True, True], [False, False, False]])
    index, found = draw_negatives(similarity, allowed, torch.full((3, 3), 0.5))
    assert index[:2].tolist() == [2, 0]
    assert found.tolist() == [True, True, False]
    # -ln(-ln 0.9) = 2.25 beats a lead of 2 over -ln(-ln 0.5) = 0.37, but not one of 1.8.
    noise = torch.tensor([[0.5, 0.9]] * 2)
    index, _ = draw_negatives(torch.tensor([[2.0, 0.0], [1.8, 0.0]]), noise > 0, noise)
    assert index.tolist() == [0, 1]


def test_a_row_is_drawn_the_same_in_any_company() -> None:
    similarity, noise = uniform(8, 6, seed=1), uniform(8, 6, seed=2)
    allowed = uniform(8, 6, seed=3) < 0.8
    whole, _ = draw_negatives(similarity, allowed, noise)
    parts = [
        draw_negatives(similarity[s], allowed[s], noise[s])[0] for s in (slice(3), slice(3, 8))
    ]
    assert torch.equal(torch.cat(parts), whole)


def test_ten_thousand_adversarial_batches_never_fail() -> None:
    """Saturated, infinite and undefined logits, noise at its ends, two rows, no negative at all."""
    random = torch.Generator().manual_seed(0)

    def pick(values: Tensor, *shape: int) -> Tensor:
        return values[torch.randint(0, len(values), shape, generator=random)]

    nasty = torch.tensor([math.inf, -math.inf, math.nan, 3e38, -3e38, 100.0, -100.0, 0.0])
    ends = torch.tensor([0.0, 1.0, 1 - 2**-24, 1e-45])
    for rows, columns in itertools.product(range(1, 5), range(1, 6)):
        shape = (500, rows, columns)
        chance = torch.rand(4, 500, 1, 1, generator=random).round(decimals=1)
        is_nasty, at_end, allowed = (torch.rand(shape, generator=random) < c for c in chance[:3])
        similarity = torch.randn(shape, generator=random) * 10 ** (7 * chance[3])
        similarity = torch.where(is_nasty, pick(nasty, *shape), similarity)
        noise = torch.where(at_end, pick(ends, *shape), torch.rand(shape, generator=random))
        batches = zip(similarity, allowed, noise, strict=True)
        drawn = [draw_negatives(*batch) for batch in batches]
        index, found = (torch.stack(part) for part in zip(*drawn, strict=True))
        assert torch.equal(found, allowed.any(dim=2))
        assert bool(((index >= 0) & (index < columns)).all())
        assert bool(allowed.gather(2, index[..., None])[..., 0][found].all())


def test_saturated_similarity_still_finds_the_others() -> None:
    """ALBEF's weights, the softmax with the diagonal set to 0, are all 0 here, and it fails."""
    similarity = torch.eye(4) * 1e4
    index, found = draw_negatives(similarity, ~torch.eye(4, dtype=torch.bool), uniform(4, 4))
    assert found.all()
    assert bool((index != torch.arange(4)).all())


def test_nan_is_drawn_only_where_there_is_nothing_else() -> None:
    similarity = torch.tensor([[math.nan, -50.0], [math.nan, 0.0]])
    allowed = torch.tensor([[True, True], [True, False]])
    index, found = draw_negatives(similarity, allowed, uniform(2, 2))
    assert index.tolist() == [1, 0]
    assert found.all()


def test_equal_infinities_are_drawn_equally() -> None:
    similarity = torch.tensor([math.inf, math.inf, 0.0]).expand(4000, 3)
    index, _ = draw_negatives(similarity, torch.ones(4000, 3, dtype=torch.bool), uniform(4000, 3))
    counts = index.bincount(minlength=3).tolist()
    assert counts[2] == 0
    assert abs(counts[0] - 2000) < 150


@pytest.mark.parametrize(("rows", "columns"), [(0, 0), (0, 3), (3, 0)])
def test_nothing_to_draw_from_finds_nothing(rows: int, columns: int) -> None:
    empty = torch.zeros(rows, columns)
    index, found = draw_negatives(empty, empty > 1, empty)
    assert index.shape == found.shape == (rows,)
    assert index.dtype == torch.int64
    assert not found.any()


def test_no_gradient_flows_through_a_draw() -> None:
    similarity = uniform(2, 2).requires_grad_()
    index, _ = draw_negatives(similarity, torch.ones(2, 2, dtype=torch.bool), uniform(2, 2))
    assert not index.requires_grad


def test_loss_of_three_rows_by_hand() -> None:
    logits = torch.tensor([[0.0, 1.0], [0.0, 1.0], [2.0, 0.0]])
    matches = torch.tensor([True, False, False])
    # softmax of one against zero: e / (1 + e), and so on.
    expected = math.log(1 + math.exp(-1)) + math.log(1 + math.exp(1)) + math.log(1 + math.exp(-2))
    assert matching_loss(logits, matches, 3).item() == pytest.approx(expected / 3)
    assert count_right(logits, matches).item() == 2


def test_loss_and_gradient_equal_a_float64_restatement() -> None:
    logits = (uniform(9, 2) * 8).requires_grad_()
    exact = logits.detach().double().requires_grad_()
    matches = torch.arange(9) < 3
    expected = torch.zeros((), dtype=torch.float64)
    for row, match in zip(exact, matches.tolist(), strict=True):
        right = torch.exp(row[1] if match else row[0])
        expected = expected - torch.log(right / (torch.exp(row[0]) + torch.exp(row[1]))) / 9
    loss = matching_loss(logits, matches, 9)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    backward(loss)
    backward(expected)
    assert logits.grad is not None
    assert exact.grad is not None
    assert torch.allclose(logits.grad.double(), exact.grad, atol=1e-5)


def test_shares_add_up_and_a_rank_without_rows_adds_nothing() -> None:
    logits, matches = uniform(7, 2).requires_grad_(), torch.arange(7) % 3 == 0
    bounds = (0, 4, 4, 7)
    shares = [
        matching_loss(logits[first:end], matches[first:end], 7)
        for first, end in zip(bounds, bounds[1:], strict=False)
    ]
    assert shares[1].item() == 0
    assert shares[1].requires_grad
    assert sum(s.item() for s in shares) == pytest.approx(matching_loss(logits, matches, 7).item())


def test_loss_without_any_row_is_zero() -> None:
    logits = torch.zeros(0, 2, requires_grad=True)
    loss = matching_loss(logits, torch.zeros(0, dtype=torch.bool), 0)
    backward(loss)
    assert loss.item() == 0
    assert count_right(logits, torch.zeros(0, dtype=torch.bool)).item() == 0


def test_bf16_logits_are_compared_in_float32() -> None:
    logits, matches = (uniform(5, 2) * 20).bfloat16(), torch.arange(5) < 2
    assert torch.equal(matching_loss(logits, matches, 5), matching_loss(logits.float(), matches, 5))
