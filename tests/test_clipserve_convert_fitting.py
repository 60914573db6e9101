from typing import Any

import pytest
import torch
from albefs import albef_table

from clipserve.convert.fitting import change_sizes, fit_positions, resize_text
from clipserve.errors import ConfigError
from clipserve.model import create
from clipserve.towers import build_network


def table(rows: int, width: int = 3) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(0))


def test_longer_texts_keep_the_first_20_positions_and_stretch_the_rest() -> None:
    before = table(77)
    after = resize_text(before, 134)  # 57 rows -> 114: two steps where one was, nearly
    assert after.shape == (134, 3)
    assert torch.equal(after[:20], before[:20])
    assert torch.equal(after[20], before[20])
    assert torch.equal(after[-1], before[-1])
    place = 1 * 56 / 113  # of row 21 among the 57 that are stretched
    expected = before[20] + place * (before[21] - before[20])
    assert torch.allclose(after[21], expected, atol=1e-6)


def test_a_short_table_is_stretched_as_a_whole() -> None:
    before = torch.tensor([[0.0], [2.0], [4.0]])
    assert resize_text(before, 5).flatten().tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_shorter_texts_keep_the_first_positions() -> None:
    before = table(77)
    assert torch.equal(resize_text(before, 30), before[:30])


@pytest.mark.parametrize("size", [40, 128])
def test_a_last_position_that_is_read_stays_the_last(size: int) -> None:
    before = table(77)
    after = resize_text(before, size, keeps_last=True)
    assert torch.equal(after[-1], before[-1])
    assert torch.equal(after[:20], before[:20])
    assert torch.equal(after[-2], before[76 - 1] if size > 77 else before[size - 2])


def test_each_table_that_changes_is_said_in_one_line(architecture: dict[str, Any]) -> None:
    wanted = change_sizes(architecture, context_length=24, image_size=64)
    own = create(wanted).network.state_dict()
    tensors = create(architecture).network.state_dict()
    first = tensors["positional_embedding"][0].clone()
    notes = fit_positions(tensors, own, wanted)
    assert notes == [
        "text positions 16 -> 24: stretched, linearly",
        "image positions 2x2 -> 4x4: interpolated, bicubic",
    ]
    assert torch.equal(tensors["positional_embedding"][0], first)
    assert {k: v.shape for k, v in tensors.items()} == {k: v.shape for k, v in own.items()}
    assert fit_positions(tensors, own, wanted) == []
    cut = {"positional_embedding": table(77, 32)}
    assert fit_positions(cut, own, {"text_cfg": {}}) == [
        "text positions 77 -> 24: the first ones stay"
    ]


def test_sizes_that_no_table_can_have_are_refused(architecture: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="no room for a word"):
        change_sizes(architecture, 2, None)
    assert change_sizes(architecture, 16, 32) == architecture


@pytest.mark.parametrize(("context_length", "positions"), [(64, 512), (8, 512), (8, None)])
def test_an_albef_reads_as_much_as_its_table_has_positions(
    context_length: int, positions: int | None
) -> None:
    before = albef_table(positions=positions)
    wanted = change_sizes(before, context_length, None)
    assert wanted["text_cfg"]["context_length"] == context_length
    weights, own = (build_network(table).state_dict() for table in (before, wanted))
    assert {k: v.shape for k, v in weights.items()} == {k: v.shape for k, v in own.items()}
    with pytest.raises(ConfigError, match=f"more than the {positions or 12} of"):
        build_network(change_sizes(before, 513, None))


@pytest.mark.parametrize("image_size", [64, 128])
def test_image_positions_are_interpolated_as_open_clip_does(
    architecture: dict[str, Any], image_size: int
) -> None:
    from open_clip.model import resize_pos_embed

    larger = change_sizes(architecture, None, 96)
    before = create(larger).network.state_dict()
    network = create(change_sizes(architecture, None, image_size)).network
    ours, theirs = dict(before), dict(before)
    fit_positions(ours, network.state_dict(), {"text_cfg": {}})
    resize_pos_embed(theirs, network)
    name = "visual.positional_embedding"
    assert torch.allclose(ours[name], theirs[name], atol=1e-6)
    assert ours[name].shape != before[name].shape
