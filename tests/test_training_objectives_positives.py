import pytest
import torch
from torch import Tensor

from training.objectives.positives import average_positives, find_positives


def draw_groups(count: int, num_groups: int, seed: int) -> Tensor:
    """Ids of few values, so that many rows agree in something."""
    random = torch.Generator().manual_seed(seed)
    return torch.randint(0, 4, (count, num_groups), generator=random)


def test_rows_that_agree_in_any_group_are_positives() -> None:
    # The first two share a picture, the last two a caption: the middle one belongs to both.
    groups = torch.tensor([[1, 10], [1, 20], [2, 20]])
    expected = torch.tensor([[True, True, False], [True, True, True], [False, True, True]])
    assert torch.equal(find_positives(groups, groups), expected)
    assert torch.equal(find_positives(groups[:1], groups[1:]), expected[:1, 1:])


def test_equal_ids_in_different_groups_mean_nothing() -> None:
    groups = torch.tensor([[1, 2], [2, 1]])
    assert torch.equal(find_positives(groups, groups), torch.eye(2, dtype=torch.bool))


@pytest.mark.parametrize("num_groups", [1, 2, 3])
def test_the_average_of_positives_equals_a_loop_over_pairs(num_groups: int) -> None:
    groups = draw_groups(11, num_groups, seed=num_groups)
    random = torch.Generator().manual_seed(0)
    features = torch.randn(11, 5, dtype=torch.float64, generator=random, requires_grad=True)
    expected = []
    for i in range(11):
        same = [
            j for j in range(11) if any(groups[i, g] == groups[j, g] for g in range(num_groups))
        ]
        expected.append(torch.stack([features[j] for j in same]).mean(dim=0))
    found = average_positives(features, groups)
    assert torch.allclose(found, torch.stack(expected), atol=1e-12)
    weights = torch.randn(11, 5, dtype=torch.float64, generator=random)
    (gradient,) = torch.autograd.grad((weights * found).sum(), features)
    (wanted,) = torch.autograd.grad((weights * torch.stack(expected)).sum(), features)
    assert torch.allclose(gradient, wanted, atol=1e-12)


def test_rows_without_a_partner_are_their_own_average() -> None:
    features = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    alone = torch.stack([torch.arange(6), torch.arange(6)], dim=1)
    assert torch.equal(average_positives(features, alone), features)
