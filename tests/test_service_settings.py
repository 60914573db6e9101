"""Settings from the environment and arguments."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from clipserve import embed
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


def test_lists_are_words_between_commas(monkeypatch):
    monkeypatch.setenv("CLIPSERVE_FETCH_PORTS", "80, 8080")
    monkeypatch.setenv("CLIPSERVE_CORS_ORIGINS", "https://a.example,https://b.example")
    monkeypatch.setenv("CLIPSERVE_FETCH_HOSTS", "")
    settings = load_settings(model_roots="/a,/b")
    assert settings.fetch_ports == (80, 8080)
    assert settings.cors_origins == ("https://a.example", "https://b.example")
    assert settings.fetch_hosts == ()
    assert settings.model_roots == (Path("/a"), Path("/b"))


def test_no_more_threads_decode_than_the_container_has_processors(monkeypatch, tmp_path):
    monkeypatch.setattr(embed, "_CPU_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(embed.os, "cpu_count", lambda: 64)
    assert Settings().decode_threads == 8
    (tmp_path / "cpu.max").write_text("250000 100000")
    assert Settings().decode_threads == 3


def test_what_opens_the_service_is_off_by_default():
    settings = Settings()
    assert not settings.allow_fetch
    assert not settings.insecure
    assert settings.cors_origins == ()
    assert settings.host == "127.0.0.1"
