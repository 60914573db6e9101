"""Settings from the environment and arguments."""

import pytest
from pydantic import ValidationError

from clipserve.errors import ConfigError
from service.settings import Settings, load_settings


def test_the_environment_sets_and_arguments_win(monkeypatch):
    monkeypatch.setenv("CLIPSERVE_PORT", "9001")
    monkeypatch.setenv("CLIPSERVE_MAX_ITEMS", "7")
    settings = load_settings(port=9002, host=None)
    assert (settings.port, settings.max_items, settings.host) == (9002, 7, "127.0.0.1")


def test_image_limits_are_the_settings_own():
    limits = load_settings(max_image_bytes=1, max_image_pixels=2, max_image_aspect=3.0).image_limits
    assert (limits.max_bytes, limits.max_pixels, limits.max_aspect) == (1, 2, 3.0)


def test_a_bad_value_is_named():
    with pytest.raises(ConfigError, match="port 70000: "):
        load_settings(port=70000)


def test_the_port_that_kubernetes_injects_is_explained(monkeypatch):
    monkeypatch.setenv("CLIPSERVE_PORT", "tcp://10.0.0.1:80")
    with pytest.raises(ConfigError, match="enableServiceLinks"):
        load_settings()


def test_a_queue_smaller_than_a_request_is_refused():
    with pytest.raises(ConfigError, match="max_queue_items 10 must be at least 256"):
        load_settings(max_queue_items=10)


def test_settings_do_not_change():
    with pytest.raises(ValidationError):
        Settings().port = 1
