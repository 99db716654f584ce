"""Live progress: what it says, how often it is written, and that a view never stops a stage."""

import threading
from typing import Any

import pytest

from tasks import live_progress
from tasks.live_progress import LiveProgress
from tasks.progress import Progress, listening


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, which a test moves by hand."""
    now = [100.0]
    monkeypatch.setattr(live_progress.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, str]]:
    """What was written of artifacts, in order."""
    calls: list[tuple[float, str]] = []

    def create(percent: float, *, key: str, description: str) -> str:
        assert key == "progress-a-r1-student"
        calls.append((percent, description.replace("\u202f", " ")))
        return "an id"

    def update(artifact: str, percent: float, *, description: str) -> None:
        assert artifact == "an id"
        calls.append((percent, description.replace("\u202f", " ")))

    monkeypatch.setattr(live_progress, "create_progress_artifact", create)
    monkeypatch.setattr(live_progress, "update_progress_artifact", update)
    return calls


def settle(progress: LiveProgress) -> None:
    """Wait for the write that is under way."""
    thread: threading.Thread | None = progress._writing  # pyright: ignore[reportPrivateUsage]
    assert thread is not None
    thread.join()


def test_progress_tells_rate_time_left_and_the_note(
    clock: list[float], written: list[tuple[float, str]]
) -> None:
    progress = LiveProgress(
        "round 1 · student",
        "steps",
        key="progress-a-r1-student",
        images_per_unit=30,
        note="last dev accuracy 81.0 % (round 0)",
    )
    heard: list[Progress] = []
    with listening(heard.append):
        progress.update(0, 100)
        settle(progress)
        clock[0] += 3
        progress.update(5, 100, loss=1.5)  # too soon to be written
        clock[0] += 7
        progress.update(20, 100, loss=1.25)
        settle(progress)
        progress.update(100, 100, loss=0.5)  # the last one at once

    # 20 steps of 30 images in 10 s are 60 images a second; 80 steps at 2 a second are 40 s.
    note = "last dev accuracy 81.0 % (round 0)"
    assert written == [
        (0.0, f"round 1 · student: 0 of 100 steps, {note}"),
        (20.0, f"round 1 · student: 20 of 100 steps, loss 1.25, 60 img/s, 40 s left, {note}"),
        (100.0, f"round 1 · student: 100 of 100 steps, loss 0.5, 300 img/s, {note}"),
    ]
    assert [one.done for one in heard] == [0, 5, 20, 100]
    assert heard[2].facts == {"loss": 1.25, "images_per_second": 60.0}


def test_what_was_done_before_counts_in_no_rate(
    clock: list[float], written: list[tuple[float, str]]
) -> None:
    progress = LiveProgress("label", "images", key="progress-a-r1-student")
    progress.update(900, 1000)
    settle(progress)
    clock[0] += 10
    progress.update(950, 1000)
    settle(progress)
    assert written[-1][1] == "label: 950 of 1000 images, 5 img/s, 10 s left"


def test_an_artifact_that_cannot_be_written_stops_nothing_and_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*arguments: Any, **more: Any) -> None:
        raise ConnectionError("the server is gone")

    monkeypatch.setattr(live_progress, "create_progress_artifact", refuse)
    progress = LiveProgress("label", "images", key="progress-gone")
    progress.update(10, 10)
    assert "progress artifact progress-gone was not written: the server is gone" in caplog.text


def test_a_slow_server_holds_up_no_step(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, answered = threading.Event(), threading.Event()
    calls: list[float] = []

    def slow(percent: float, **more: Any) -> None:
        calls.append(percent)
        asked.set()
        answered.wait(60)

    monkeypatch.setattr(live_progress, "create_progress_artifact", slow)
    progress = LiveProgress("label", "images", key="progress-slow")
    for done in range(5):
        clock[0] += 100
        progress.update(done, 10)
        assert asked.wait(60)
    assert calls == [0.0], "one write at a time"
    answered.set()
    settle(progress)
