from __future__ import annotations

import pytest

from clip_base.runtime import progress


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
