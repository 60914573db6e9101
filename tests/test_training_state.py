from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from clipserve import checkpoint
from clipserve.errors import CheckpointError
from clipserve.model import Model, ModelInfo
from training.order import Position
from training.state import Counters, State, seed_step, verify_state

ORDER = {"datasets": "abc", "batch_size": 4}


def make_state(model: Model, **more: Any) -> State:
    return State(model, torch.optim.AdamW(model.parameters()), ORDER, **more)


def save(state: State, folder: Path) -> Path:
    checkpoint.save(state.model, folder, name="m")
    state.save(folder)
    return folder


class Queue(nn.Module):
    """What an objective may remember: a parameter and a buffer."""

    def __init__(self, fill: float) -> None:
        super().__init__()
        self.twin = nn.Parameter(torch.full((3,), fill))
        self.register_buffer("rows", torch.full((2, 2), fill))


def test_all_that_changes_comes_back(tiny_model: Model, architecture: Any, tmp_path: Path) -> None:
    state = make_state(tiny_model, extras={"queue": Queue(1.5)})
    for _ in range(2):
        tiny_model.network.visual.proj.sum().backward()
        state.optimizer.step()
    state.position, state.counters = Position(3, 8), Counters(11, 44, 1, 0.5, 9.0)
    folder = save(state, tmp_path / "c")
    verify_state(folder)

    torch.manual_seed(1)
    from clipserve.model import create

    other = make_state(create(architecture), extras={"queue": Queue(0.0)})
    other.restore(folder)
    assert (other.position, other.counters) == (Position(3, 8), Counters(11, 44, 1, 0.5, 9.0))
    assert torch.equal(other.extras["queue"].rows, torch.full((2, 2), 1.5))
    assert torch.equal(other.extras["queue"].twin, torch.full((3,), 1.5))
    for name, value in tiny_model.network.state_dict().items():
        assert torch.equal(value, other.model.network.state_dict()[name])
    before, after = state.optimizer.state_dict()["state"], other.optimizer.state_dict()["state"]
    assert before.keys() == after.keys()
    assert all(torch.equal(before[i][k], after[i][k]) for i in before for k in before[i])


def test_a_link_that_moves_while_it_is_read_mixes_no_checkpoints(
    tiny_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, link = make_state(tiny_model), tmp_path / "latest"
    for step in (1, 2):
        state.counters = Counters(step=step)
        save(state, tmp_path / f"{step}")
    link.symlink_to("1")
    load = checkpoint.load_for_training

    def load_and_move(directory: Path) -> Model:
        model = load(directory)
        link.unlink()
        link.symlink_to("2")
        return model

    monkeypatch.setattr(checkpoint, "load_for_training", load_and_move)
    state.restore(link)
    assert (state.counters.step, link.readlink()) == (1, Path("2"))


def test_a_state_without_what_the_run_needs_is_refused(tiny_model: Model, tmp_path: Path) -> None:
    folder = save(make_state(tiny_model), tmp_path / "c")
    with pytest.raises(CheckpointError, match=r"lacks queue\.safetensors"):
        make_state(tiny_model, extras={"queue": Queue(0.0)}).restore(folder)


def test_another_order_is_refused_with_what_changed(tiny_model: Model, tmp_path: Path) -> None:
    folder = save(make_state(tiny_model), tmp_path / "c")
    for key, value, words in (
        ("batch_size", 8, "batch_size changed .* from 4 to 8"),
        ("datasets", "xyz", "the training shards or their weights changed"),
        ("replacement", True, "replacement changed .* from None to True"),
    ):
        state = State(tiny_model, torch.optim.AdamW(tiny_model.parameters()), {**ORDER, key: value})
        with pytest.raises(CheckpointError, match=words):
            state.restore(folder)


def test_a_newer_format_and_a_missing_state_say_so(tiny_model: Model, tmp_path: Path) -> None:
    checkpoint.save(tiny_model, tmp_path / "bare", name="m")
    with pytest.raises(CheckpointError, match="cannot be resumed from"):
        make_state(tiny_model).restore(tmp_path / "bare")


def test_a_run_does_not_go_on_from_another_start(
    tiny_model: Model, architecture: Any, tmp_path: Path
) -> None:
    from clipserve.model import create

    def begun(start: str | None) -> State:
        model = create(architecture)
        if start is not None:
            model.info = ModelInfo(training={"start_fingerprint": start})
        return make_state(model)

    folder = save(begun("abc"), tmp_path / "c")
    begun("abc").restore(folder)
    for now, words in (("xyz", "the weights xyz"), (None, "fresh weights")):
        with pytest.raises(CheckpointError, match=f"began with the weights abc, .* means {words}"):
            begun(now).restore(folder)


@pytest.mark.parametrize("content", ["[]", '{"files": 3}', "{", ""])
def test_a_state_that_is_none_is_refused(tiny_model: Model, tmp_path: Path, content: str) -> None:
    folder = save(make_state(tiny_model), tmp_path / "c")
    (folder / "state" / "state.json").write_text(content)
    with pytest.raises(CheckpointError, match="cannot be resumed from"):
        make_state(tiny_model).restore(folder)


def test_a_steps_random_numbers_depend_on_seed_step_and_rank_alone() -> None:
    def draw(*key: int) -> float:
        seed_step(*key)
        return torch.rand(()).item()

    assert draw(0, 5, 0) == draw(0, 5, 0)
    keys = [(0, 5, 0), (0, 6, 0), (1, 5, 0), (0, 5, 1), (5, 0, 0)]
    assert len({draw(*key) for key in keys}) == len(keys)


def with_heads(model: Model, **sizes: int) -> State:
    """A state that trains heads beside the model, with a step of moments for all."""
    heads = nn.ModuleDict({name: nn.Linear(3, size) for name, size in sizes.items()})
    optimizer = torch.optim.AdamW([*heads.parameters(), *model.parameters()])
    state = State(model, optimizer, ORDER, extras={"heads": heads} if sizes else {})
    for number, parameter in enumerate(
        p for group in optimizer.param_groups for p in group["params"]
    ):
        parameter.grad = torch.full_like(parameter, 1.0 + number)
    optimizer.step()
    return state


def test_moments_go_to_the_parameters_they_are_of(tiny_model: Model, tmp_path: Path) -> None:
    state = with_heads(tiny_model, one=4)
    folder = save(state, tmp_path / "c")
    other = with_heads(tiny_model, one=4)
    groups = other.optimizer.param_groups
    groups[0]["params"] = groups[0]["params"][::-1]  # as if it were built in another order
    other.restore(folder)
    for parameter in tiny_model.parameters():
        found = other.optimizer.state[parameter]["exp_avg"]
        assert torch.equal(found, state.optimizer.state[parameter]["exp_avg"])


@pytest.mark.parametrize("sizes", [{}, {"one": 5}, {"two": 4}, {"one": 4, "two": 4}])
def test_other_heads_than_the_saved_ones_are_refused_and_nothing_is_taken_over(
    tiny_model: Model, architecture: Any, tmp_path: Path, sizes: dict[str, int]
) -> None:
    folder = save(with_heads(tiny_model, one=4), tmp_path / "c")
    from clipserve.model import create

    other = with_heads(create(architecture), **sizes)
    before = {name: value.clone() for name, value in other.model.network.state_dict().items()}
    with pytest.raises(CheckpointError, match="start anew in another `out`") as caught:
        other.restore(folder)
    assert "\n" not in str(caught.value)
    after = other.model.network.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_what_a_checkpoint_remembers_beyond_the_run_is_refused(
    tiny_model: Model, tmp_path: Path
) -> None:
    folder = save(make_state(tiny_model, extras={"queue": Queue(1.0)}), tmp_path / "c")
    with pytest.raises(CheckpointError, match="holds queue.safetensors, which this run's obj"):
        make_state(tiny_model).restore(folder)


def test_a_state_of_an_earlier_format_says_so(tiny_model: Model, tmp_path: Path) -> None:
    from training import state as module

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "FORMAT_VERSION", 2)
        folder = save(make_state(tiny_model), tmp_path / "c")
    with pytest.raises(CheckpointError, match="format 2 of an earlier clipserve"):
        make_state(tiny_model).restore(folder)
