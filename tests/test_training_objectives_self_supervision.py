import math
import multiprocessing
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from training.distributed import World
from training.objectives.self_supervision import (
    BatchNorm,
    PredictingHead,
    Projector,
    barlow_twins_loss,
    build_method,
    simclr_loss,
    simsiam_loss,
    vicreg_loss,
)

METHODS = ("simclr", "barlow_twins", "vicreg", "simsiam")
CASES = ([5, 4], [4, 2, 0, 3])
"""rows of each rank"""


def views(count: int, size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two views, related and of no particular length."""
    random = torch.Generator().manual_seed(seed)
    both = torch.randn(count, size, generator=random)
    first, second = (both + torch.randn(count, size, generator=random) for _ in range(2))
    return first.requires_grad_(), second.requires_grad_()


# ---- the same in float64, one number at a time


def cosine(a: Tensor, b: Tensor) -> Tensor:
    product = torch.zeros((), dtype=torch.float64)
    for x, y in zip(a, b, strict=True):
        product = product + x * y
    return product / torch.sqrt((a**2).sum() * (b**2).sum())


def naive_simclr(first: Tensor, second: Tensor, temperature: float = 0.1) -> Tensor:
    everyone = [*first, *second]
    count = len(first)
    total = torch.zeros((), dtype=torch.float64)
    for i, one in enumerate(everyone):
        partner = everyone[(i + count) % (2 * count)]
        terms = [
            torch.exp(cosine(one, other) / temperature)
            for k, other in enumerate(everyone)
            if k != i
        ]
        total = total - torch.log(torch.exp(cosine(one, partner) / temperature) / sum(terms))
    return total / (2 * count)


def naive_barlow_twins(first: Tensor, second: Tensor) -> Tensor:
    count, size = first.shape
    total = torch.zeros((), dtype=torch.float64)
    standard = []
    for view in (first, second):
        columns = []
        for column in view.T:
            mean = sum(column) / count
            variance = sum((x - mean) ** 2 for x in column) / count
            columns.append([(x - mean) / torch.sqrt(variance + 1e-5) for x in column])
        standard.append(columns)
    for i in range(size):
        for j in range(size):
            pairs = zip(standard[0][i], standard[1][j], strict=True)
            correlation = sum(x * y for x, y in pairs) / count
            total = total + ((1 - correlation) ** 2 if i == j else 0.005 * correlation**2)
    return total


def naive_vicreg(first: Tensor, second: Tensor) -> Tensor:
    count, size = first.shape
    invariance = sum(
        (first[n, i] - second[n, i]) ** 2 for n in range(count) for i in range(size)
    ) / (count * size)
    total = 25 * torch.as_tensor(invariance)
    for view in (first, second):
        mean = [sum(column) / count for column in view.T]
        for i in range(size):
            for j in range(size):
                products = [(row[i] - mean[i]) * (row[j] - mean[j]) for row in view]
                covariance = torch.as_tensor(sum(products) / (count - 1))
                if i == j:
                    total = total + 25 * (1 - torch.sqrt(covariance + 1e-4)).clamp(min=0) / size
                else:
                    total = total + covariance**2 / size
    return total


def naive_simsiam(first: Tensor, second: Tensor) -> Tensor:
    size = first.shape[1] // 2
    total = torch.zeros((), dtype=torch.float64)
    for one, other in zip(first, second, strict=True):
        total = total - cosine(one[size:], other[:size].detach()) / 2
        total = total - cosine(other[size:], one[:size].detach()) / 2
    return total / len(first)


NAIVE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "simclr": naive_simclr,
    "barlow_twins": naive_barlow_twins,
    "vicreg": naive_vicreg,
    "simsiam": naive_simsiam,
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(("count", "size"), [(2, 2), (7, 4), (9, 6)])
def test_value_and_gradients_equal_a_float64_restatement(name: str, count: int, size: int) -> None:
    first, second = views(count, size, seed=count)
    exact = [view.detach().double().requires_grad_() for view in (first, second)]
    expected = NAIVE[name](exact[0], exact[1])
    value = build_method(name, 0.1).loss(first, second)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(expected.item(), rel=1e-6, abs=1e-6)
    expected_gradients = torch.autograd.grad(expected, exact)
    gradients = torch.autograd.grad(value, [first, second])
    for one, other in zip(gradients, expected_gradients, strict=True):
        assert torch.allclose(one.double(), other, atol=1e-5, rtol=1e-5)


# ---- by hand


def test_simclr_of_two_unlike_pictures_by_hand() -> None:
    # Of each view: the partner has cosine 1, the two views of the other picture 0.
    eye = torch.eye(2)
    expected = -math.log(math.exp(2) / (math.exp(2) + 2))
    assert simclr_loss(eye, 3 * eye, temperature=0.5).item() == pytest.approx(expected)


def test_simclr_without_information_costs_ln_of_the_others() -> None:
    same = torch.ones(9, 4)
    assert simclr_loss(same, same).item() == pytest.approx(math.log(17), abs=1e-6)


def test_simclr_of_one_picture_costs_nothing() -> None:
    assert simclr_loss(torch.ones(1, 4), -torch.ones(1, 4)).item() == 0


def test_barlow_twins_by_hand() -> None:
    # Columns (1, -1) and (1, -1): every correlation is 1, so two of (1 - 1)^2 and two of 0.005.
    rows = torch.tensor([[1.0, 1.0], [-1.0, -1.0]])
    assert barlow_twins_loss(rows, rows).item() == pytest.approx(0.01, abs=1e-6)
    # Turned round, every correlation is -1.
    assert barlow_twins_loss(rows, -rows).item() == pytest.approx(8.01, abs=1e-3)


def test_vicreg_by_hand() -> None:
    # Both columns have variance 2 and covariance 2; one of two features off by 1 in every row.
    first = torch.tensor([[1.0, 1.0], [-1.0, -1.0]])
    second = first + torch.tensor([1.0, 0.0])
    assert vicreg_loss(first, second).item() == pytest.approx(25 * 0.5 + 2 * (4 + 4) / 2)
    # No spread at all: both hinges are 1 - sqrt(1e-4).
    flat = torch.zeros(2, 2)
    assert vicreg_loss(flat, flat).item() == pytest.approx(25 * 2 * 0.99)


def test_simsiam_is_minus_one_where_predictions_are_right() -> None:
    projections, predictions = torch.randn(5, 3), torch.randn(5, 3)
    first = torch.cat([projections, 2 * predictions], dim=1)
    second = torch.cat([predictions, 3 * projections], dim=1)
    assert simsiam_loss(first, second).item() == pytest.approx(-1)


def test_simsiam_stops_the_gradient_of_projections() -> None:
    first, second = views(6, 8)
    simsiam_loss(first, second).backward()  # type: ignore[no-untyped-call]
    for view in (first, second):
        assert view.grad is not None
        assert not view.grad[:, :4].any()
        assert view.grad[:, 4:].any()


# ---- shares of several ranks


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("counts", [[3, 4], [3, 1, 0, 3]])
def test_shares_of_ranks_add_up_to_the_whole(name: str, counts: list[int]) -> None:
    first, second = (view.detach().double().requires_grad_() for view in views(7, 4))
    loss = build_method(name, 0.2).loss
    whole = loss(first, second)
    gradients = torch.autograd.grad(whole, [first, second])
    ends = [sum(counts[: i + 1]) for i in range(len(counts))]
    slices = [slice(end - count, end) for end, count in zip(ends, counts, strict=True)]
    shares = [loss(first, second, own=own) for own in slices]
    parts = [torch.autograd.grad(share, [first, second]) for share in shares]
    assert sum(share.item() for share in shares) == pytest.approx(whole.item(), abs=1e-12)
    for view in range(2):
        summed = torch.stack([part[view] for part in parts]).sum(0)
        assert torch.allclose(summed, gradients[view], atol=1e-12)


# ---- precision, and odd batches


@pytest.mark.parametrize("name", METHODS)
def test_computes_in_float32_under_autocast(name: str) -> None:
    first, second = (view.detach().bfloat16() for view in views(16, 8))
    loss = build_method(name, 0.1).loss
    exact = loss(first.float(), second.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(loss(first, second), exact)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("rows", [torch.zeros(4, 6), torch.ones(4, 6), torch.ones(1, 6)], ids=str)
def test_rows_without_spread_leave_loss_and_gradient_finite(name: str, rows: Tensor) -> None:
    first, second = rows.clone().requires_grad_(), rows.clone().requires_grad_()
    value = build_method(name, 0.01).loss(first, second)
    gradients = torch.autograd.grad(value, [first, second])
    assert math.isfinite(value.item())
    assert all(gradient.isfinite().all() for gradient in gradients)


# ---- heads


def test_batch_norm_is_torchs_in_training_mode() -> None:
    random = torch.Generator().manual_seed(0)
    rows = (50 + 3 * torch.randn(11, 5, generator=random)).requires_grad_()
    ours, theirs = BatchNorm(5), nn.BatchNorm1d(5)
    for norm in (ours, theirs):
        nn.init.uniform_(norm.weight, generator=torch.Generator().manual_seed(1))
        nn.init.uniform_(norm.bias, generator=torch.Generator().manual_seed(2))
    found, expected = ours(rows), theirs(rows)
    assert torch.allclose(found, expected, atol=1e-5)
    for norm, output in ((ours, found), (theirs, expected)):
        norm.zero_grad()
        output.pow(3).sum().backward()
    for one, other in ((ours.weight, theirs.weight), (ours.bias, theirs.bias)):
        assert one.grad is not None
        assert other.grad is not None
        assert torch.allclose(one.grad, other.grad, rtol=1e-4)
    a, b = (torch.autograd.grad(norm(rows).pow(3).sum(), rows)[0] for norm in (ours, theirs))
    assert torch.allclose(a, b, atol=1e-4)


def test_batch_norm_counts_the_batch_in_eval_mode_too() -> None:
    rows = torch.randn(6, 3)
    norm = BatchNorm(3)
    assert torch.equal(norm(rows), norm.eval()(rows))
    assert not dict(norm.named_buffers())


def test_the_projector_is_slips_stack_of_layers() -> None:
    torch.manual_seed(0)
    head = Projector(6, 16, 4)
    peer = nn.Sequential(
        *(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU()),
        *(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU()),
        nn.Linear(16, 4),
    )
    weights = dict(zip(peer.state_dict(), peer.state_dict().values(), strict=True))
    learned = [name for name, _ in peer.named_parameters()]
    for name, parameter in zip(learned, head.parameters(), strict=True):
        weights[name] = parameter.detach()
    peer.load_state_dict(weights)
    features = torch.randn(10, 6)
    assert torch.allclose(head(features), peer(features), atol=1e-5)


def test_simsiams_head_gives_projections_then_predictions() -> None:
    head = PredictingHead(6, 16, 8)
    rows = head(torch.randn(10, 6))
    assert rows.shape == (10, 16)
    projections, predictions = rows.chunk(2, dim=1)
    assert torch.allclose(projections.mean(0), torch.zeros(8), atol=1e-5)
    assert torch.allclose(projections.var(0, correction=0), torch.ones(8), atol=1e-2)
    assert torch.allclose(predictions, head.predictor(projections))


@pytest.mark.parametrize("name", METHODS)
def test_a_head_learns_to_make_views_agree(name: str) -> None:
    torch.manual_seed(0)
    method = build_method(name, 0.1)
    head = method.build_head(6, 16, 8, World())
    first, second = (view.detach() for view in views(32, 6))
    optimizer = torch.optim.SGD(head.parameters(), lr=0.02)
    losses = []
    for _ in range(30):
        loss = method.loss(head(first), head(second))
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert losses[-1] < losses[0]


# ---- real ranks: head, gather and loss against one process


def learned(name: str, world: World, counts: list[int]) -> dict[str, Tensor]:
    """The loss and all gradients that a rank has, of features that are the same on all."""
    torch.manual_seed(0)
    method = build_method(name, 0.1)
    head = method.build_head(5, 8, 4, world)
    start = sum(counts[: world.rank])
    rows = slice(start, start + counts[world.rank])
    features = [view.detach().requires_grad_() for view in views(sum(counts), 5)]
    outputs = [world.gather(head(view[rows]), counts) for view in features]
    share = method.loss(outputs[0], outputs[1], own=rows)
    share.backward()  # type: ignore[no-untyped-call]
    found = {f"view {i}": view.grad for i, view in enumerate(features)}
    found |= {parameter: weight.grad for parameter, weight in head.named_parameters()}
    given = {key: gradient for key, gradient in found.items() if gradient is not None}
    return {"share": share.detach()} | given


def be_rank(rank: int, folder: str) -> None:
    """One rank of each of CASES, one after the other."""
    for counts in CASES:
        size = len(counts)
        if rank < size:
            store = f"file://{folder}/store{size}"
            dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
            found = {name: learned(name, World(rank, size), counts) for name in METHODS}
            torch.save(found, f"{folder}/{rank}-of-{size}.pt")
            dist.destroy_process_group()


def test_two_and_four_ranks_equal_one_process_on_the_whole_batch(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    started = [context.Process(target=be_rank, args=(rank, str(tmp_path))) for rank in range(4)]
    for process in started:
        process.start()
    for process in started:
        process.join()
    assert [process.exitcode for process in started] == [0, 0, 0, 0]
    for counts in CASES:
        size = len(counts)
        ranks = [torch.load(tmp_path / f"{rank}-of-{size}.pt") for rank in range(size)]
        for name in METHODS:
            for key, value in learned(name, World(), [sum(counts)]).items():
                summed = torch.stack([rank[name].get(key, torch.zeros(())) for rank in ranks]).sum(
                    0
                )
                assert torch.allclose(summed, value, atol=1e-5), (counts, name, key)
