import pytest

from clipserve.console import LINE_EVERY_S, Counter, print_table


def test_without_a_terminal_progress_is_a_line_a_minute(capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    with Counter("embedding", clock=lambda: now) as counter:
        counter.update(100, 10_000)
        assert capsys.readouterr().err == ""
        now = LINE_EVERY_S
        counter.update(1500, 10_000)
        assert capsys.readouterr().err == "embedding: 1,500 of 10,000, 25.0/s, 6 min left\n"
        now += 10
        counter.update(1600, 10_000)
        assert capsys.readouterr().err == ""
        now += LINE_EVERY_S
        counter.update(1850, 10_000_000)  # at the rate since the last line
        shown = capsys.readouterr().err
        assert shown == "embedding: 1,850 of 10,000,000, 5.0/s, 555 h 27 min left\n"


def test_progress_without_a_known_end(capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    with Counter("embedding", clock=lambda: now) as counter:
        now = 2 * LINE_EVERY_S
        counter.update(12)
    assert capsys.readouterr().err == "embedding: 12, 0.1/s\n"
    assert capsys.readouterr().out == ""


def test_a_table_has_its_columns_to_the_right(capsys: pytest.CaptureFixture[str]) -> None:
    print_table([["k", "recall"], ["10", "0.951"], ["1000", "1"]])
    assert capsys.readouterr().out == "   k  recall\n  10   0.951\n1000       1\n"


def test_on_a_terminal_progress_is_one_line_with_rate_and_end(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"TTY_COMPATIBLE": "1", "COLUMNS": "100"}.items():
        monkeypatch.setenv(name, value)
    with Counter("embedding") as counter:
        for done in range(0, 500, 100):
            counter.update(done, 1000)
    shown = capsys.readouterr()
    assert "embedding" in shown.err
    assert "400/1000" in shown.err
    assert "/s" in shown.err
    assert shown.out == ""
