"""Which items are the next batch. No threads, no model."""

import math

import pytest

from service.scheduler import HOLD_S, Item, Job, Schedule


@pytest.fixture
def schedule() -> Schedule:
    return Schedule({"image": 4, "text": 8, "match": 4, "call": 1})


def put(schedule, *data, kind="text", priority="interactive", job=None):
    job = job or Job(len(data), lambda: None)
    for index, one in enumerate(data):
        schedule.add(Item(job, index, kind, one, priority, 0.0))
    return job


def batch(schedule):
    return [item.data for item in schedule.next_batch(0.0)]


@pytest.mark.parametrize(("first", "second"), [("image", "text"), ("text", "image")])
def test_kinds_go_apart_and_the_longest_waiting_first(schedule, first, second):
    put(schedule, 1, kind=first)
    put(schedule, 2, kind=second)
    put(schedule, 3, kind=first)
    assert [batch(schedule), batch(schedule), bool(schedule)] == [[1, 3], [2], False]


def test_a_batch_is_never_larger_than_its_kind_allows(schedule):
    put(schedule, *range(6), kind="image")
    assert [len(batch(schedule)) for _ in range(2)] == [4, 2]


def test_a_long_request_does_not_hold_up_a_short_one_behind_it(schedule):
    put(schedule, *range(100, 120))
    put(schedule, 1)
    assert batch(schedule) == [100, 1, 101, 102, 103, 104, 105, 106]


def test_a_long_request_does_not_hold_up_the_other_kind(schedule):
    put(schedule, *range(100, 120), kind="image")
    put(schedule, 1, kind="text")
    assert batch(schedule) == [100, 101, 102, 103]
    assert batch(schedule) == [1]


def test_what_goes_before_a_job_ends_is_counted_by_turns(schedule):
    put(schedule, *range(100, 120))
    put(schedule, 1, 2)
    put(schedule, 3, kind="image")
    put(schedule, 4, priority="bulk")
    mine = put(schedule, 5)
    assert schedule.count_until(mine, "text", "interactive", 0) == 3
    assert schedule.count_until(mine, "text", "interactive", 2) == 3 + 3 + 2
    assert schedule.count_until(Job(1, lambda: None), "image", "interactive", 1) == 2


def test_interactive_goes_before_bulk(schedule):
    put(schedule, 1, priority="bulk", kind="image")
    put(schedule, 2)
    assert [batch(schedule), batch(schedule)] == [[2], [1]]


def test_bulk_gets_one_small_batch_after_eight_interactive_ones(schedule):
    put(schedule, *range(100), priority="bulk")
    ran = []
    for _ in range(18):
        put(schedule, -1)
        ran.append(batch(schedule))
    assert [i for i, items in enumerate(ran) if items[0] >= 0] == [8, 17]
    assert len(ran[8]) == 2  # a quarter, for somebody waits, or soon will


def test_bulk_alone_grows_to_full_batches(schedule):
    put(schedule, -1)
    put(schedule, *range(100), priority="bulk")
    assert [len(batch(schedule)) for _ in range(11)] == [1] + [2] * 8 + [8] * 2


def test_urgent_goes_first_and_takes_others_of_its_kind_along(schedule):
    put(schedule, 1, kind="image")
    put(schedule, 2)
    put(schedule, 3, priority="bulk")
    put(schedule, 99, priority="urgent")
    assert batch(schedule) == [99, 2]


def test_a_part_of_a_request_waits_for_what_is_being_prepared_of_it(schedule):
    job = Job(3, lambda: None)
    assert schedule.ready_s() == math.inf
    job.prepare("image", [0, 1, 2])
    job.prepared(0)
    put(schedule, 0, kind="image", job=job)
    assert schedule
    assert schedule.ready_s() == HOLD_S
    job.prepared(1)
    assert schedule.ready_s() == HOLD_S
    job.settle(2, ValueError("cannot be read"))
    assert schedule.ready_s() == -math.inf


def test_a_part_is_held_for_a_moment_only(schedule):
    job = Job(3, lambda: None)
    job.prepare("image", [1, 2])
    put(schedule, 0, kind="image", job=job)
    schedule.add(Item(job, 1, "image", 1, "interactive", 9.0))
    assert schedule.ready_s() == HOLD_S  # of the item that came first
    assert [item.data for item in schedule.next_batch(HOLD_S)] == [0, 1]


def test_a_text_does_not_wait_for_the_pictures_beside_it(schedule):
    job = Job(2, lambda: None)
    job.prepare("image", [1])
    put(schedule, 0, kind="text", job=job)
    assert schedule.ready_s() == -math.inf
    assert batch(schedule) == [0]


def test_a_whole_request_takes_the_parts_of_others_along(schedule):
    job = Job(2, lambda: None)
    job.prepare("image", [1])
    put(schedule, 0, kind="image", job=job)
    put(schedule, 9, kind="image")
    assert schedule.ready_s() == -math.inf
    assert batch(schedule) == [0, 9]


@pytest.mark.parametrize(("kind", "priority"), [("text", "interactive"), ("image", "bulk")])
def test_what_may_begin_goes_before_what_is_held(schedule, kind, priority):
    job = Job(2, lambda: None)
    job.prepare("image", [1])
    put(schedule, 0, kind="image", job=job)
    put(schedule, 9, kind=kind, priority=priority)
    assert batch(schedule) == [9]
    job.prepared(1)
    put(schedule, 1, kind="image", job=job)
    assert batch(schedule) == [0, 1]


def test_a_request_of_which_more_comes_just_now_is_a_batch_all_the_same(schedule):
    job = Job(2, lambda: None)
    put(schedule, 0, kind="image", job=job)
    assert schedule.ready_s() == -math.inf
    job.prepare("image", [1])  # what it waited for elsewhere is its own to compute after all
    assert batch(schedule) == [0]


def test_a_part_that_fills_a_batch_waits_for_nothing(schedule):
    job = Job(9, lambda: None)
    job.prepare("image", [8])
    put(schedule, *range(3), kind="image", job=job)
    assert schedule.ready_s() == HOLD_S
    schedule.add(Item(job, 3, "image", 3, "interactive", 0.0))
    assert schedule.ready_s() == -math.inf


def test_what_is_settled_is_not_prepared_any_more():
    job = Job(2, lambda: None)
    job.settle(0, "found")
    job.prepare("text", [0])
    assert not job.is_preparing("text")
    job.prepare("text", [1])
    assert job.is_preparing("text")
    job.settle(1, "found")
    assert not job.is_preparing("text")


def test_a_dropped_job_leaves_nothing(schedule):
    gone = put(schedule, 1, 2)
    put(schedule, 3)
    schedule.drop(gone)
    assert batch(schedule) == [3]
    assert not schedule


def test_clearing_takes_everything_out(schedule):
    put(schedule, 1, kind="image")
    put(schedule, 2, priority="bulk")
    assert sorted(item.data for item in schedule.clear()) == [1, 2]
    assert not schedule


def test_a_result_is_settled_once_and_told_once():
    job, told = Job(1, lambda: None), []
    job.when_settled(0, told.append)
    job.settle(0, "first")
    job.settle(0, "late")
    job.when_settled(0, told.append)
    assert (job.results, told) == (["first"], ["first", "first"])


def test_a_job_of_nothing_is_done():
    assert Job(0, lambda: None).done.done()
