"""What is counted, and under which names."""

from service.telemetry import Telemetry


def shown(telemetry: Telemetry) -> str:
    return telemetry.render().decode()


def test_a_model_tells_of_batches_steps_padding_and_its_cache():
    telemetry = Telemetry()
    model = telemetry.observe_model("tiny")
    model.batch("image", 3, 0.2, 0.1)
    model.stage("decode", "image", 0.03)
    model.padding(0.25)
    model.cache_hit("text")
    model.cache_miss("text")
    model.cache_miss("head")
    model.restart()
    text = shown(telemetry)
    for line in (
        'clipserve_batch_size_sum{kind="image",model="tiny"} 3.0',
        'clipserve_batch_seconds_sum{kind="image",model="tiny"} 0.2',
        'clipserve_queue_seconds_sum{kind="image",model="tiny"} 0.1',
        'clipserve_stage_seconds_sum{kind="image",model="tiny",stage="decode"} 0.03',
        'clipserve_padding_share_sum{model="tiny"} 0.25',
        'clipserve_cache_hits_total{kind="text",model="tiny"} 1.0',
        'clipserve_cache_misses_total{kind="text",model="tiny"} 1.0',
        'clipserve_cache_misses_total{kind="head",model="tiny"} 1.0',
        'clipserve_model_restarts_total{model="tiny"} 1.0',
    ):
        assert line in text


def test_what_is_under_way_is_asked_for_when_it_is_shown():
    telemetry = Telemetry()
    held = {"queue": 0, "requests": 0, "bytes": 0}
    telemetry.watch_queue("tiny", lambda: held["queue"])
    telemetry.watch_load(lambda: held["requests"], lambda: held["bytes"])
    held.update(queue=7, requests=2, bytes=1000)
    text = shown(telemetry)
    assert 'clipserve_queue_items{model="tiny"} 7.0' in text
    assert "clipserve_inflight_requests 2.0" in text
    assert "clipserve_inflight_bytes 1000.0" in text


def test_two_services_do_not_share_their_numbers():
    one, other = Telemetry(), Telemetry()
    one.rejected("overloaded")
    assert "overloaded" not in shown(other)
