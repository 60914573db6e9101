import math
from dataclasses import dataclass, fields

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import backward

from training.objectives.momentum_contrast import momentum_contrast_loss


@dataclass
class Features:
    """The first eight arguments of the loss but alpha."""

    image: Tensor
    text: Tensor
    twin_image: Tensor
    twin_text: Tensor
    queue_image: Tensor
    queue_text: Tensor
    scale: Tensor

    @property
    def trained(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.image, self.text, self.scale

    def loss(
        self,
        alpha: float,
        own: slice | None = None,
        groups: Tensor | None = None,
        queue_groups: Tensor | None = None,
    ) -> Tensor:
        rows = slice(None) if own is None else own
        return momentum_contrast_loss(
            self.image[rows],
            self.text[rows],
            self.twin_image,
            self.twin_text,
            self.queue_image,
            self.queue_text,
            self.scale,
            alpha,
            own=own,
            groups=groups,
            queue_groups=queue_groups,
        )

    def to(self, dtype: torch.dtype) -> "Features":
        """Leaves of their own."""
        tensors = (getattr(self, field.name) for field in fields(self))
        image, text, *rest = (t.detach().to(dtype).requires_grad_() for t in tensors)
        return Features(image, text, *rest)


def draw(batch: int, queued: int, width: int = 6, scale: float = 14.3, seed: int = 0) -> Features:
    """Pairs that are alike, and those that the twin sees as well."""
    random = torch.Generator().manual_seed(seed)
    subject = torch.randn(batch, width, generator=random)
    near = [subject + torch.randn(batch, width, generator=random) / 2 for _ in range(4)]
    queued_ones = [torch.randn(queued, width, generator=random) for _ in range(2)]
    units = [F.normalize(rows, dim=1) for rows in near + queued_ones]
    image, text, *rest = (t.requires_grad_() for t in [*units, torch.tensor(scale)])
    return Features(image, text, *rest)


def draw_groups(batch: int, queued: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Few different numbers, so that many agree, in batch and queue, by either column."""
    random = torch.Generator().manual_seed(seed)
    numbers = torch.randint(0, 6, (batch + queued, 2), generator=random)
    return numbers[:batch], numbers[batch:]


def naive(
    f: Features, alpha: float, groups: Tensor | None = None, queue_groups: Tensor | None = None
) -> Tensor:
    """ALBEF's equation 6 as its code has it, in float64, one number at a time."""
    batch, queued = len(f.image), len(f.queue_image)

    def positive(i: int, j: int) -> bool:
        if groups is None or queue_groups is None:
            return i == j
        other = groups[j] if j < batch else queue_groups[j - batch]
        return i == j or any(a == b for a, b in zip(groups[i], other, strict=True))

    total = torch.zeros((), dtype=torch.float64)
    for query, twin_query, keys, queue in (
        (f.image, f.twin_image, f.twin_text, f.queue_text),
        (f.text, f.twin_text, f.twin_image, f.queue_image),
    ):
        columns = [keys[j] for j in range(batch)] + [queue[j] for j in range(queued)]
        for i in range(batch):
            scores = [f.scale * (query[i] * column.detach()).sum() for column in columns]
            twins = [math.exp(f.scale.item() * (twin_query[i] @ c).item()) for c in columns]
            count = sum(positive(i, j) for j in range(len(columns)))
            denominator = sum(torch.exp(score) for score in scores)
            for j, score in enumerate(scores):
                target = alpha * twins[j] / sum(twins) + (1 - alpha) * positive(i, j) / count
                total = total - target * torch.log(torch.exp(score) / denominator)
    return total / (2 * batch)


def test_one_pair_and_two_queued_by_hand() -> None:
    picture, other = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    queue = torch.cat([other, other])
    scale = torch.tensor(2.0)
    # Each row scores its pair 2 and both queued ones 0.
    right = math.exp(2) / (math.exp(2) + 2)
    hard = momentum_contrast_loss(picture, picture, picture, picture, queue, queue, scale, 0.0)
    assert hard.item() == pytest.approx(-math.log(right))
    # The twin, as sure of itself as the network, makes the target its own softmax.
    soft = momentum_contrast_loss(picture, picture, picture, picture, queue, queue, scale, 1.0)
    wrong = (1 - right) / 2
    entropy = -right * math.log(right) - 2 * wrong * math.log(wrong)
    assert soft.item() == pytest.approx(entropy)


def test_a_duplicate_in_the_queue_shares_the_target_by_hand() -> None:
    picture, other = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    queue = torch.cat([picture, other])
    found = momentum_contrast_loss(
        picture,
        picture,
        picture,
        picture,
        queue,
        queue,
        torch.tensor(2.0),
        groups=torch.tensor([[7]]),
        queue_groups=torch.tensor([[7], [8]]),
    )
    # Half of the target on each of the two equal keys, which score 2 to the other's 0.
    assert found.item() == pytest.approx(-math.log(math.exp(2) / (2 * math.exp(2) + 1)))


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("queued", [0, 1, 7])
@pytest.mark.parametrize("grouped", [False, True])
def test_value_and_gradients_equal_a_float64_restatement(
    alpha: float, queued: int, grouped: bool
) -> None:
    ours = draw(4, queued, seed=queued)
    same = draw_groups(4, queued, seed=queued) if grouped else (None, None)
    exact = ours.to(torch.float64)
    found, expected = ours.loss(alpha, None, *same), naive(exact, alpha, *same)
    assert found.item() == pytest.approx(expected.item(), abs=1e-6)
    backward(found)
    backward(expected)
    for one, other in zip(ours.trained, exact.trained, strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert torch.allclose(one.grad.double(), other.grad, atol=1e-5)


def test_gradient_flows_into_features_and_scale_only() -> None:
    features = draw(3, 5)
    backward(features.loss(0.4))
    has_gradient = {f.name for f in fields(features) if getattr(features, f.name).grad is not None}
    assert has_gradient == {"image", "text", "scale"}


@pytest.mark.parametrize("grouped", [False, True])
def test_shares_of_two_and_four_ranks_add_up(grouped: bool) -> None:
    for bounds in ((0, 3, 8), (0, 2, 2, 5, 8)):  # one rank without rows among the four
        whole, shared = draw(8, 5), draw(8, 5)
        same = draw_groups(8, 5) if grouped else (None, None)
        expected = whole.loss(0.4, None, *same)
        backward(expected)
        shares = [
            shared.loss(0.4, slice(first, end), *same)
            for first, end in zip(bounds, bounds[1:], strict=False)
        ]
        backward(torch.stack(shares).sum())
        assert sum(s.item() for s in shares) == pytest.approx(expected.item())
        for one, other in zip(shared.trained, whole.trained, strict=True):
            assert one.grad is not None
            assert other.grad is not None
            assert torch.allclose(one.grad, other.grad, atol=1e-6)


def test_without_queue_and_momentum_it_is_the_contrastive_loss() -> None:
    from open_clip import ClipLoss

    f = draw(16, 0)
    found = momentum_contrast_loss(
        f.image, f.text, f.image, f.text, f.queue_image, f.queue_text, f.scale
    )
    assert found.item() == pytest.approx(ClipLoss()(f.image, f.text, f.scale).item(), abs=1e-6)


def test_no_information_costs_ln_of_the_number_of_keys() -> None:
    same = F.normalize(torch.ones(3, 4), dim=1)
    queue = same[:1].expand(10, 4)
    found = momentum_contrast_loss(same, same, same, same, queue, queue, torch.tensor(50.0), 0.4)
    assert found.item() == pytest.approx(math.log(13))


def test_scores_are_float32_under_autocast() -> None:
    features = draw(8, 16, scale=100.0)
    exact = features.loss(0.4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(features.loss(0.4), exact)


def test_bf16_features_at_scale_100_stay_finite() -> None:
    features = draw(8, 16, scale=100.0)
    half = features.to(torch.bfloat16)
    loss = half.loss(0.4)
    backward(loss)
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)
    assert all(torch.isfinite(t.grad).all() for t in half.trained if t.grad is not None)


def test_queue_is_not_copied() -> None:
    features = draw(2, 4096, width=64)
    with torch.profiler.profile(profile_memory=True) as profiler, torch.no_grad():
        features.loss(0.4)
    largest = max(event.self_cpu_memory_usage for event in profiler.events())
    queue_bytes = features.queue_image.nbytes
    assert 0 < largest < queue_bytes / 8
