"""The token bucket, with a clock of its own."""

import pytest

from service import rate
from service.errors import Overloaded
from service.rate import RateLimit


def test_tokens_come_back_with_time():
    now = 0.0
    limit = RateLimit(6, clock=lambda: now)
    for _ in range(6):
        limit.take("a")
    with pytest.raises(Overloaded) as caught:
        limit.take("a")
    assert caught.value.headers == {"Retry-After": "10"}
    now = 9.0
    with pytest.raises(Overloaded) as caught:
        limit.take("a")
    assert caught.value.headers == {"Retry-After": "1"}
    now = 10.0
    limit.take("a")
    now = 1000.0
    for _ in range(6):
        limit.take("a")
    with pytest.raises(Overloaded):
        limit.take("a")


def test_clients_do_not_share_a_bucket():
    limit = RateLimit(1, clock=lambda: 0.0)
    limit.take("a")
    limit.take("b")


def test_zero_is_no_limit():
    limit = RateLimit(0)
    for _ in range(1000):
        limit.take("a")


def test_the_table_is_bounded(monkeypatch):
    monkeypatch.setattr(rate, "_MAX_CLIENTS", 3)
    limit = RateLimit(1, clock=lambda: 0.0)
    for client in "abcd":
        limit.take(client)
    limit.take("a")  # forgotten
    with pytest.raises(Overloaded):
        limit.take("d")
