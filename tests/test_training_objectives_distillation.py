import math
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from training.objectives.distillation import affinity_distillation_loss, feature_distillation_loss


def unit(count: int, size: int, seed: int) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, size, generator=random), dim=1)


def pairs(count: int, size: int = 4, teacher_size: int = 6) -> list[Tensor]:
    """What affinity_distillation_loss takes, in its order."""
    return [
        unit(count, size, seed=0).requires_grad_(),
        unit(count, size, seed=1).requires_grad_(),
        unit(count, teacher_size, seed=2),
        unit(count, teacher_size, seed=3),
        torch.tensor(3.0, requires_grad=True),
        torch.tensor(7.0),
    ]


def naive_features(student: Tensor, teacher: Tensor) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for one, other in zip(student, teacher, strict=True):
        norms = torch.sqrt((one**2).sum() * (other**2).sum())
        cosine = sum(x * y for x, y in zip(one, other, strict=True)) / norms
        total = total + 2 - 2 * cosine
    return total / len(student)


def naive_affinity(tensors: Sequence[Tensor]) -> Tensor:
    image, text, teacher_image, teacher_text, scale, teacher_scale = tensors
    count = len(image)
    total = torch.zeros((), dtype=torch.float64)
    for ours, others, theirs, their_others in (
        (image, text, teacher_image, teacher_text),
        (text, image, teacher_text, teacher_image),
    ):
        for i in range(count):
            logits = [scale * (ours[i] * others[j]).sum() for j in range(count)]
            answers = [teacher_scale * (theirs[i] * their_others[j]).sum() for j in range(count)]
            partition = torch.stack(answers).exp().sum()
            log_partition = torch.stack(logits).exp().sum().log()
            for j in range(count):
                total = total - answers[j].exp() / partition * (logits[j] - log_partition)
    return total / (2 * count)


# ---- features


@pytest.mark.parametrize(("count", "size"), [(1, 2), (5, 3), (8, 16)])
def test_features_equal_a_float64_restatement(count: int, size: int) -> None:
    random = torch.Generator().manual_seed(count)
    student, teacher = (torch.randn(count, size, generator=random) for _ in range(2))
    ours, theirs = student.clone().requires_grad_(), student.double().requires_grad_()
    value = feature_distillation_loss(ours, teacher, count)
    expected = naive_features(theirs, teacher.double())
    assert value.item() == pytest.approx(expected.item(), abs=1e-6)
    (gradient,) = torch.autograd.grad(value, ours)
    (expected_gradient,) = torch.autograd.grad(expected, theirs)
    assert torch.allclose(gradient.double(), expected_gradient, atol=1e-5)


def test_features_by_hand() -> None:
    student = torch.tensor([[3.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    teacher = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-1.0, 0.0]])  # cosines 1, 0, -1
    assert feature_distillation_loss(student, teacher, 3).item() == pytest.approx((0 + 2 + 4) / 3)


def test_features_of_ranks_add_up() -> None:
    student, teacher = unit(5, 4, seed=0), unit(5, 4, seed=1)
    shares = [feature_distillation_loss(student[s], teacher[s], 5) for s in (slice(2), slice(2, 5))]
    whole = feature_distillation_loss(student, teacher, 5)
    assert sum(share.item() for share in shares) == pytest.approx(whole.item())
    assert feature_distillation_loss(student[:0], teacher[:0], 5).item() == 0


# ---- affinity


@pytest.mark.parametrize("count", [1, 2, 7])
def test_affinity_equals_a_float64_restatement(count: int) -> None:
    ours = pairs(count)
    exact = [tensor.detach().double() for tensor in ours]
    learned = [0, 1, 4]
    for i in learned:
        exact[i].requires_grad_()
    value = affinity_distillation_loss(*ours)
    expected = naive_affinity(exact)
    assert value.item() == pytest.approx(expected.item(), abs=1e-6)
    gradients = torch.autograd.grad(value, [ours[i] for i in learned])
    expected_gradients = torch.autograd.grad(expected, [exact[i] for i in learned])
    for one, other in zip(gradients, expected_gradients, strict=True):
        assert torch.allclose(one.double(), other, atol=1e-5)


def test_affinity_equals_open_clips_loss() -> None:
    from open_clip.loss import DistillClipLoss

    ours, theirs = pairs(16, 8, 12), pairs(16, 8, 12)
    value = affinity_distillation_loss(*ours)
    order = [theirs[i] for i in (0, 1, 4, 2, 3, 5)]
    _, expected = DistillClipLoss()(*order)
    assert value.item() == pytest.approx(expected.item(), abs=1e-6)
    value.backward()  # type: ignore[no-untyped-call]
    expected.backward()
    for i in (0, 1, 4):
        one, other = ours[i].grad, theirs[i].grad
        assert one is not None
        assert other is not None
        assert torch.allclose(one, other, atol=1e-5)


def test_affinity_to_a_teacher_of_orthogonal_pairs_by_hand() -> None:
    # Teacher: e^2 / (e^2 + 1) for the own pair. Student: every logit 0, so ln 2 whatever is asked.
    eye, same = torch.eye(2), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    value = affinity_distillation_loss(same, same, eye, eye, torch.tensor(5.0), torch.tensor(2.0))
    assert value.item() == pytest.approx(math.log(2))
    # Student as sure as the teacher: the entropy of its answer.
    value = affinity_distillation_loss(eye, eye, eye, eye, torch.tensor(2.0), torch.tensor(2.0))
    right = math.exp(2) / (math.exp(2) + 1)
    entropy = -right * math.log(right) - (1 - right) * math.log(1 - right)
    assert value.item() == pytest.approx(entropy)


def test_nothing_is_to_be_learned_from_a_teacher_who_agrees() -> None:
    image, text, *_, scale, _ = pairs(6)
    value = affinity_distillation_loss(image, text, image, text, scale, scale)
    for gradient in torch.autograd.grad(value, [image, text, scale]):
        assert torch.allclose(gradient, torch.zeros_like(gradient), atol=1e-6)


def test_no_gradient_reaches_the_teacher() -> None:
    tensors = [tensor.detach().requires_grad_() for tensor in pairs(4)]
    affinity_distillation_loss(*tensors).backward()  # type: ignore[no-untyped-call]
    assert [tensor.grad is not None for tensor in tensors] == [
        True,
        True,
        False,
        False,
        True,
        False,
    ]
    student, teacher = (unit(4, 4, seed=s).requires_grad_() for s in range(2))
    feature_distillation_loss(student, teacher, 4).backward()  # type: ignore[no-untyped-call]
    assert student.grad is not None
    assert teacher.grad is None


@pytest.mark.parametrize("counts", [[3, 4], [3, 1, 0, 3]])
def test_affinities_of_ranks_add_up_to_the_whole(counts: list[int]) -> None:
    tensors = [tensor.detach().double() for tensor in pairs(7)]
    learned = [tensors[i].requires_grad_() for i in (0, 1, 4)]
    whole = affinity_distillation_loss(*tensors)
    gradients = torch.autograd.grad(whole, learned)
    ends = [sum(counts[: i + 1]) for i in range(len(counts))]
    shares = [
        affinity_distillation_loss(*tensors, own=slice(end - count, end))
        for end, count in zip(ends, counts, strict=True)
    ]
    parts = [torch.autograd.grad(share, learned) for share in shares]
    assert sum(share.item() for share in shares) == pytest.approx(whole.item(), abs=1e-12)
    for i, gradient in enumerate(gradients):
        summed = torch.stack([part[i] for part in parts]).sum(0)
        assert torch.allclose(summed, gradient, atol=1e-12)


def test_logits_are_float32_under_autocast_and_finite_when_steep() -> None:
    tensors = [tensor.detach().bfloat16().requires_grad_() for tensor in pairs(64, 32, 32)[:4]]
    scales = [torch.tensor(100.0, requires_grad=True), torch.tensor(100.0)]
    exact = affinity_distillation_loss(*[tensor.float() for tensor in tensors + scales])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = affinity_distillation_loss(*tensors + scales)
    assert torch.equal(value, exact)
    for gradient in torch.autograd.grad(value, [*tensors[:2], scales[0]]):
        assert gradient.isfinite().all()
