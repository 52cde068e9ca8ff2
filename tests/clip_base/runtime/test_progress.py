from __future__ import annotations

import threading

import pytest

from clip_base.runtime import announce, progress


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (42, "42 s"), (59.7, "1 min 00 s"), (185, "3 min 05 s"), (7800, "2 h 10 min")],
)
def test_a_duration_is_written_as_people_read_it(seconds: float, text: str) -> None:
    assert progress.clock(seconds) == text


def test_what_is_tracked_passes_through_and_short_work_says_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert list(progress.track(iter("abc"), "letters")) == ["a", "b", "c"]
    assert capsys.readouterr().err == ""


def test_long_work_says_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 10.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with progress.Progress("training", total=20, done=4) as bar:
        for _ in range(5):
            now += 6
            bar.advance(note="loss 1.0")
    assert (
        capsys.readouterr().err
        == "training: 6/20, 1 min 24 s left, loss 1.0\ntraining: 8/20, 1 min 12 s left, loss 1.0\n"
    )


def test_the_first_step_which_also_loads_and_compiles_promises_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with progress.Progress("detecting", total=100) as bar:
        now += 240  # a slow start
        bar.advance(16)
        now += 2
        bar.advance(16)
    assert capsys.readouterr().err == "detecting: 16/100\ndetecting: 32/100, 8 s left\n"


@pytest.mark.parametrize(
    ("count", "seconds", "text"),
    [
        (0, 5, "no image yet"),
        (1000, 4, "250 images/s"),
        (33, 10, "3.3 images/s"),
        (3, 10, "3.3 s per image"),
        (1, 60, "1 min 00 s per image"),
    ],
)
def test_a_speed_is_never_told_as_zero(count: int, seconds: float, text: str) -> None:
    assert progress.rate(count, seconds) == text


@pytest.mark.parametrize("quiet", ["", "1"])
def test_work_that_takes_a_while_is_announced_unless_it_shall_be_quiet(
    quiet: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(announce.QUIET, quiet)
    monkeypatch.setattr(announce, "PATIENCE", 0.0)
    announce.after_a_while("loading weights …").join()
    assert capsys.readouterr().err == ("" if quiet else "loading weights …\n")


def test_short_work_is_not_announced_and_its_timer_ends_with_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(announce.QUIET, "")
    monkeypatch.setattr(announce, "PATIENCE", 3600.0)
    before = set(threading.enumerate())
    with announce.announced("short work"), progress.Progress("detecting", total=3):
        timers = set(threading.enumerate()) - before
    assert len(timers) == 2
    for timer in timers:
        timer.join(60)
    assert not any(timer.is_alive() for timer in timers)
    assert capsys.readouterr().err == ""
