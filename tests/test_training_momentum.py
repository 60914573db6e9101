from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from clipserve.errors import ConfigError
from clipserve.files import save_tensors
from training.momentum import FeatureQueue, Twin


class Small(nn.Module):
    """Tied weights, an average, a counter, a float64 scalar, and a constant with infinities."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(5, 3)
        self.norm = nn.BatchNorm1d(3)
        self.dropout = nn.Dropout(0.5)
        self.decoder = nn.Linear(3, 5)
        self.decoder.weight = self.words.weight
        self.logit_scale = nn.Parameter(torch.tensor(2.5, dtype=torch.float64))
        mask = torch.full((2, 2), -torch.inf).triu(1)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        states: Tensor = self.decoder(self.dropout(self.norm(self.words(ids))))
        return states


@pytest.fixture
def network() -> Small:
    torch.manual_seed(0)
    return Small()


def move(network: Small, seed: int) -> None:
    """What an optimizer step does to a network, for the twin: all its weights change."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=random))
        network.norm.get_buffer("running_mean").add_(seed + 1)
        network.norm.get_buffer("num_batches_tracked").add_(1)


def test_twin_after_three_updates_by_hand() -> None:
    network = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        network.weight.fill_(1.0)
    twin = Twin(network, momentum=0.5)
    for value in (2.0, 4.0, 8.0):
        with torch.no_grad():
            network.weight.fill_(value)
        twin.update(network)
    # 1 -> 1.5 -> 2.75 -> 5.375
    assert twin.state_dict()["weight"].item() == 5.375


def test_twin_equals_a_float64_restatement(network: Small) -> None:
    twin = Twin(network, momentum=0.9)
    expected = {name: value.double().clone() for name, value in network.state_dict().items()}
    for seed in range(3):
        move(network, seed)
        twin.update(network)
        for name, value in network.state_dict().items():
            expected[name] = 0.9 * expected[name] + 0.1 * value.double()
    for name, value in twin.network.state_dict().items():
        if value.is_floating_point():
            assert torch.allclose(value.double(), expected[name], atol=1e-6), name
    assert twin.network.get_parameter("logit_scale").dtype == torch.float64


def test_twin_averages_running_means_and_copies_counters(network: Small) -> None:
    twin = Twin(network, momentum=0.75)
    move(network, seed=3)
    twin.update(network)
    assert twin.state_dict()["norm.running_mean"].tolist() == [1.0] * 3  # a quarter of the way to 4
    assert twin.state_dict()["norm.num_batches_tracked"].item() == 1


def test_twin_leaves_constants_with_infinities_alone(network: Small) -> None:
    twin = Twin(network)
    twin.update(network)
    assert torch.equal(twin.network.get_buffer("mask"), network.get_buffer("mask"))


@pytest.mark.parametrize(("momentum", "follows"), [(0.0, True), (1.0, False)])
def test_twin_at_the_limits_copies_or_stays(network: Small, momentum: float, follows: bool) -> None:
    twin = Twin(network, momentum)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    move(network, seed=0)
    twin.update(network)
    expected = network.state_dict() if follows else before
    for name, parameter in twin.network.named_parameters():
        assert torch.equal(parameter, expected[name]), name


def test_twin_does_not_touch_the_network(network: Small) -> None:
    twin = Twin(network)
    move(network, seed=0)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    twin.update(network)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_twin_learns_nothing_and_drops_nothing_out(network: Small) -> None:
    network.train()
    twin = Twin(network)
    ids = torch.arange(5)
    assert torch.equal(twin(ids), twin(ids))
    assert not any(module.training for module in twin.modules())
    assert not any(module.training for module in twin.train().modules())
    assert network.training
    assert not any(parameter.requires_grad for parameter in twin.parameters())
    assert not twin(ids).requires_grad


def test_twin_saves_under_the_networks_names_and_tied_weights_once(
    network: Small, tmp_path: Path
) -> None:
    twin = Twin(network)
    assert twin.state_dict().keys() == network.state_dict().keys() - {"decoder.weight"}
    move(network, seed=0)
    twin.update(network)
    save_tensors(twin.state_dict(), tmp_path / "twin.safetensors")
    other = Twin(Small())
    other.load_state_dict(load_file(tmp_path / "twin.safetensors"))
    for name, value in twin.network.state_dict().items():
        assert torch.equal(other.network.state_dict()[name], value), name
    tied = [
        other.network.get_submodule(name)._parameters["weight"] for name in ("words", "decoder")
    ]
    assert tied[0] is tied[1]


def test_twin_takes_over_a_networks_own_state(network: Small) -> None:
    twin = Twin(network)
    move(network, seed=0)
    twin.load_state_dict(network.state_dict())
    assert torch.equal(twin.network.get_parameter("words.weight"), network.words.weight)


def test_twin_refuses_a_state_with_a_missing_or_unknown_name(network: Small) -> None:
    twin, state = Twin(network), network.state_dict()
    with pytest.raises(RuntimeError, match=r"words\.weight"):
        twin.load_state_dict({n: v for n, v in state.items() if not n.endswith("s.weight")})
    with pytest.raises(RuntimeError, match="surplus"):
        twin.load_state_dict({**state, "surplus": torch.zeros(1)})


def test_twin_inside_another_module_saves_and_loads(network: Small) -> None:
    outer = nn.ModuleDict({"twin": Twin(network)})
    state = {name: value.clone() for name, value in outer.state_dict().items()}
    assert "twin.words.weight" in state
    other = nn.ModuleDict({"twin": Twin(Small())})
    other.load_state_dict(state)
    assert torch.equal(other.state_dict()["twin.words.weight"], state["twin.words.weight"])


@pytest.mark.parametrize("momentum", [-0.1, 1.1])
def test_twin_refuses_a_momentum_that_is_no_fraction(network: Small, momentum: float) -> None:
    with pytest.raises(ConfigError, match=f"momentum = {momentum}"):
        Twin(network, momentum)


def rows(first: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs number first, first + 1, ...: the number is in all that is stored of them."""
    numbers = torch.arange(first, first + count)
    image = numbers[:, None].float().expand(count, 2)
    return image, -image, numbers[:, None].expand(count, 3)


def content(queue: FeatureQueue) -> list[int]:
    """Numbers of the stored pairs, slot by slot; their three parts agree."""
    numbers = queue.groups[:, 0].tolist()
    assert queue.image.tolist() == [[number] * 2 for number in numbers]
    assert queue.text.tolist() == [[-number] * 2 for number in numbers]
    assert queue.groups.tolist() == [[number] * 3 for number in numbers]
    return numbers


def test_queue_wraps_a_batch_that_does_not_divide_it() -> None:
    queue = FeatureQueue(5, embed_dim=2, num_groups=3)
    found = []
    for first in (0, 3, 6):
        queue.push(*rows(first, 3))
        found.append(content(queue))
    assert found == [[0, 1, 2], [5, 1, 2, 3, 4], [5, 6, 7, 8, 4]]
    assert (queue.cursor, queue.filled) == (4, 5)


@pytest.mark.parametrize("size", [0, 1, 2, 3, 7, 8])
def test_queue_holds_the_last_pairs_whatever_the_batches(size: int) -> None:
    queue, kept, pushed = FeatureQueue(size, embed_dim=2, num_groups=3), list[int](), 0
    for count in (0, 1, 3, 2, 7, 8, 20, 5, 0, 16, 1):
        queue.push(*rows(pushed, count))
        pushed += count
        kept = [*kept, *range(pushed - count, pushed)][-size:] if size else []
        assert sorted(content(queue)) == kept
        for slot, number in enumerate(content(queue)):
            assert number % size == slot


def test_queue_starts_empty() -> None:
    queue = FeatureQueue(4, embed_dim=2)
    assert queue.image.shape == queue.text.shape == (0, 2)
    assert queue.groups.shape == (0, 1)


def test_queue_is_written_in_place_and_its_views_are_no_copies() -> None:
    queue = FeatureQueue(4, embed_dim=2, num_groups=3)
    places = [buffer.data_ptr() for buffer in queue.buffers()]
    queue.push(*rows(0, 4))
    queue.push(*rows(4, 3))
    assert [buffer.data_ptr() for buffer in queue.buffers()] == places
    assert [view.data_ptr() for view in (queue.image, queue.text, queue.groups)] == places


def test_queue_keeps_no_graph_and_stores_float32() -> None:
    queue = FeatureQueue(4, embed_dim=2, num_groups=3)
    image = F.normalize(torch.ones(3, 2, dtype=torch.bfloat16, requires_grad=True), dim=1)
    queue.push(image, image, rows(0, 3)[2])
    assert not queue.image.requires_grad
    assert queue.image.dtype == torch.float32
    assert torch.equal(queue.image, image.detach().float())


def test_queue_goes_on_from_a_file(tmp_path: Path) -> None:
    whole, first, second = (FeatureQueue(5, embed_dim=2, num_groups=3) for _ in range(3))
    for queue in (whole, first):
        queue.push(*rows(0, 7))
    save_tensors(first.state_dict(), tmp_path / "queue.safetensors")
    second.load_state_dict(load_file(tmp_path / "queue.safetensors"))
    for queue in (whole, second):
        queue.push(*rows(7, 4))
    assert content(second) == content(whole) == [10, 6, 7, 8, 9]
    assert second.cursor == whole.cursor


def test_queue_refuses_another_size_and_says_which() -> None:
    saved = FeatureQueue(4, embed_dim=2).state_dict()
    with pytest.raises(ConfigError, match=r"\(4, 2\), this run's has \(6, 2\)"):
        FeatureQueue(6, embed_dim=2).load_state_dict(saved)
    with pytest.raises(ConfigError, match=r"\(4, 1\), this run's has \(4, 3\)"):
        FeatureQueue(4, embed_dim=2, num_groups=3).load_state_dict(saved)
    del saved["stored_text"]
    with pytest.raises(RuntimeError, match="stored_text"):
        FeatureQueue(4, embed_dim=2).load_state_dict(saved)


def test_queue_refuses_a_negative_size() -> None:
    with pytest.raises(ConfigError, match="queue_size = -1"):
        FeatureQueue(-1, embed_dim=2)
