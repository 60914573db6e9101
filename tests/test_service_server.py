"""The server on a real socket: loading, draining, and its address."""

import threading

import pytest
from listening import WAIT_S, Running, is_closed, serving

from clipserve.errors import ConfigError
from service.server import listen


def test_probes_are_answered_while_models_load_and_work_is_not(running: Running):
    with running.client() as client:
        assert client.get("/health/live").status_code == 200
        refused = client.get("/v1/quick")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "loading")
    with serving(running) as client:
        assert client.get("/v1/quick").status_code == 200


def test_what_stops_the_loading_stops_the_server(running: Running):
    running.failure = ConfigError("no such model")
    running.may_load.set()
    running.thread.join(WAIT_S)
    assert not running.thread.is_alive()
    assert running.server.failure is running.failure
    assert not running.ready.is_set()


def test_a_signal_lets_requests_end_and_begins_no_other(running: Running):
    answers = []
    with serving(running) as client, running.client() as other:
        assert other.get("/v1/quick").status_code == 200
        asking = threading.Thread(target=lambda: answers.append(client.get("/v1/slow")))
        asking.start()
        assert running.asked.wait(WAIT_S)
        running.signal()
        refused = other.get("/v1/quick")
        while refused.status_code == 200:  # the signal is noticed by the event loop
            refused = other.get("/v1/quick")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        assert refused.headers["connection"] == "close"
        assert other.get("/health/live").status_code == 200
        running.may_answer.set()
        asking.join(WAIT_S)
    (answer,) = answers
    assert (answer.status_code, answer.json()) == (200, "done")
    assert answer.headers["connection"] == "close"
    running.thread.join(WAIT_S)
    assert not running.thread.is_alive()


def test_after_a_signal_while_loading_it_does_not_say_that_it_is_ready(running: Running):
    with running.client() as client:
        assert client.get("/health/live").status_code == 200
        running.signal()
    running.may_load.set()
    running.thread.join(WAIT_S)
    assert not running.thread.is_alive()
    assert not running.ready.is_set()


@pytest.mark.parametrize("running", [{"shutdown_timeout_s": 0.05}], indirect=True)
def test_a_request_that_does_not_end_is_not_waited_for(running: Running):
    with serving(running), running.connect() as connection:
        connection.sendall(b"GET /v1/slow HTTP/1.1\r\nHost: x\r\n\r\n")
        assert running.asked.wait(WAIT_S)
        running.signal()
        assert is_closed(connection)
        running.may_answer.set()
        running.thread.join(WAIT_S)
        assert not running.thread.is_alive()


def test_a_taken_port_is_named():
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port}: Address already"):
            listen("127.0.0.1", port)


def test_an_address_that_is_none_is_named():
    with pytest.raises(ConfigError, match="cannot be listened on"):
        listen("no such host", 0)
