"""What is noted of a request while it is served."""

import contextvars
import math

from service.notes import notes, start, without_deadline


def test_shared_work_has_no_deadline_but_is_counted():
    contextvars.Context().run(check_shared_work)


def check_shared_work() -> None:
    own = start("a")
    own.deadline_s, own.items = 5.0, 1
    with without_deadline():
        assert (notes().id, notes().deadline_s) == ("a", math.inf)
        notes().items += 2
        notes().ran(0.5, 0.25)
    assert notes() is own
    assert (own.deadline_s, own.items) == (5.0, 3)
    assert own.seconds == {"queue": 0.5, "inference": 0.25}
