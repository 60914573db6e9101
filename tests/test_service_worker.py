"""How one bad item is told from its good neighbours."""

import numpy as np
import pytest

from service.errors import ModelFailed
from service.worker import check, isolate


class Fake:
    """Doubles numbers; fails when a bad one is among them."""

    def __init__(self, *bad: int) -> None:
        self.bad = set(bad)
        self.sizes: list[int] = []

    def __call__(self, data):
        self.sizes.append(len(data))
        if self.bad & set(data):
            raise RuntimeError("secret 0x7f")
        return [2 * one for one in data]


def test_good_items_take_one_call():
    fake = Fake()
    assert isolate(fake, range(32)) == [2 * i for i in range(32)]
    assert fake.sizes == [32]


@pytest.mark.parametrize("bad", [0, 13, 31])
def test_a_bad_item_fails_alone_at_a_logarithmic_cost(bad):
    fake = Fake(bad)
    answers = isolate(fake, range(32))
    assert isinstance(answers[bad], ModelFailed)
    assert "secret" not in str(answers[bad])  # the log's, not the client's
    assert [answers[i] for i in range(32) if i != bad] == [2 * i for i in range(32) if i != bad]
    assert len(fake.sizes) == 11


def test_a_broken_model_is_not_tried_for_ever():
    fake = Fake(*range(64))
    answers = isolate(fake, range(64))
    assert all(isinstance(answer, ModelFailed) for answer in answers)
    assert len(set(map(id, answers))) == 64  # each is completed with its own place later
    assert len(fake.sizes) == 30


def test_a_vector_that_is_not_finite_fails_alone():
    rows = check(np.array([[1.0, 2.0], [np.nan, 0.0], [3.0, 4.0]]), 3)
    assert isinstance(rows[1], ModelFailed)
    assert [rows[0].tolist(), rows[2].tolist()] == [[1.0, 2.0], [3.0, 4.0]]


def test_numbers_are_checked_as_vectors_are():
    found = check(np.array([0.5, np.inf], dtype=np.float32), 2)
    assert found[0] == 0.5
    assert isinstance(found[1], ModelFailed)


def test_a_wrong_number_of_answers_is_the_models_failure():
    with pytest.raises(ModelFailed, match="2 answers for 3"):
        check(np.zeros((2, 4)), 3)
