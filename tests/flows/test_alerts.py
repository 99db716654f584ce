"""Signs of a collapse from one round to the next, and what a run tells the server of itself."""

import math
from collections.abc import Callable
from typing import Any

import pytest

from flows import watching
from flows.alerts import Balance, balance_of, signs_of_collapse
from flows.config import SelfTrainingConfig
from flows.opening import OpenRun, open_run
from flows.watching import Watcher
from storage.store import open_store
from tasks.progress import Progress


def summary(predicted: list[int], coverage: float = 0.5) -> dict[str, Any]:
    names = "abc"
    return {
        "coverage": coverage,
        "classes": [{"name": names[i], "predicted": n} for i, n in enumerate(predicted)],
    }


def balance(**changes: Any) -> Balance:
    values = {"top_class": "a", "top_share": 0.2, "divergence": 0.05, "coverage": 0.4} | changes
    return Balance(**values)


def test_the_balance_of_a_selection_is_measured_against_the_labels() -> None:
    found = balance_of(summary([60, 30, 10], coverage=0.25), [5, 5, 10])

    assert (found.top_class, found.top_share, found.coverage) == ("a", 0.6, 0.25)
    # 0.6 ln(0.6/0.25) + 0.3 ln(0.3/0.25) + 0.1 ln(0.1/0.5) = 0.52528 + 0.05470 - 0.16094
    assert found.divergence == pytest.approx(0.41903, abs=1e-4)


def test_classes_like_those_of_the_labels_do_not_diverge() -> None:
    assert balance_of(summary([10, 20, 70]), [1, 2, 7]).divergence == pytest.approx(0, abs=1e-12)


def test_a_class_that_is_never_predicted_adds_nothing() -> None:
    # All predictions are one of three equal classes: ln 3.
    assert balance_of(summary([0, 9, 0]), [1, 1, 1]).divergence == pytest.approx(math.log(3))


@pytest.mark.parametrize(
    ("before", "now", "signs"),
    [
        ({}, {}, []),
        # More than 1.5 times as large, and more than 2 points more.
        ({"top_share": 0.2}, {"top_share": 0.301}, ["largest class"]),
        ({"top_share": 0.2}, {"top_share": 0.299}, []),
        ({"top_share": 0.02}, {"top_share": 0.041}, ["largest class"]),
        ({"top_share": 0.002}, {"top_share": 0.02}, []),
        # More than 0.1 nats away.
        ({"divergence": 0.05}, {"divergence": 0.151}, ["0.151 nats"]),
        ({"divergence": 0.05}, {"divergence": 0.149}, []),
        # Less than three quarters.
        ({"coverage": 0.4}, {"coverage": 0.299}, ["coverage fell from 40.0% to 29.9%"]),
        ({"coverage": 0.4}, {"coverage": 0.301}, []),
        # A balance that gets better is none.
        ({"top_share": 0.5, "divergence": 0.6, "coverage": 0.2}, {}, []),
    ],
)
def test_signs_begin_at_the_documented_limits(
    before: dict[str, float], now: dict[str, float], signs: list[str]
) -> None:
    found = signs_of_collapse(balance(**before), balance(**now))

    assert len(found) == len(signs)
    for words, sign in zip(signs, found, strict=True):
        assert words in sign


def test_several_signs_are_all_named() -> None:
    collapsed = balance(top_class="b", top_share=0.9, divergence=1.2, coverage=0.1)
    found = signs_of_collapse(balance(), collapsed)
    assert len(found) == 3
    assert "'b', has 90.0% of the predictions" in found[0]


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """Event and payload of what is emitted, in the place of being sent."""
    events: list[tuple[str, dict[str, Any]]] = []

    def keep(*, event: str, resource: Any, related: Any, payload: dict[str, Any]) -> None:
        events.append((event, payload))

    monkeypatch.setattr("flows.run_events.emit_event", keep)
    return events


@pytest.fixture
def opened(tmp_path: Any, tiny_config: Callable[..., SelfTrainingConfig]) -> OpenRun:
    store = open_store(str(tmp_path / "store"))
    return open_run(store, tiny_config(store.url))


def test_progress_is_told_now_and_then_and_only_where_there_is_some(
    opened: OpenRun,
    told: list[tuple[str, dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = [1000.0]
    monkeypatch.setattr(watching, "monotonic", lambda: clock[0])
    watcher = Watcher(opened)

    for seconds, done in [(1, 1), (299, 2), (300, 3), (301, 4), (600, 3), (700, 5), (1001, 5)]:
        clock[0] = 1000.0 + seconds
        watcher.on_progress(Progress("round 0", done, 10, "steps"))

    # At 600 and 1001 s nothing is further than what was told; a hanging stage must fall silent.
    assert [(event, payload["done"]) for event, payload in told] == [
        ("selftrain.run.progress", 3),
        ("selftrain.run.progress", 5),
    ]
    assert told[0][1] == {
        "run": "tiny",
        "store": opened.store.url,
        "stage": "round 0",
        "done": 3,
        "total": 10,
        "unit": "steps",
    }


def test_a_retried_stage_that_begins_again_is_silent_until_it_is_further(
    opened: OpenRun,
    told: list[tuple[str, dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(watching, "SECONDS_BETWEEN_SIGNS", 0.0)
    watcher = Watcher(opened)
    for done in (7, 2, 6, 8):
        watcher.on_progress(Progress("label", done, 10, "images"))
    assert [payload["done"] for _, payload in told] == [7, 8]


@pytest.mark.slow
@pytest.mark.usefixtures("prefect_api", "trained_here")
def test_a_run_tells_of_its_stages_and_of_a_student_that_is_worse(
    tmp_path: Any,
    tiny_config: Callable[..., SelfTrainingConfig],
    told: list[tuple[str, dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from flows.self_training import self_training

    worse_report = {"is_promoted": False, "difference": -0.25, "interval": [-0.4, -0.1]}
    monkeypatch.setattr(watching, "read_report", lambda store, manifest: worse_report)
    monkeypatch.setattr(watching, "signs_of_collapse", lambda before, now: ["a sign"])
    config = tiny_config(tmp_path / "store", "baseline=false")

    status = self_training(config)

    events = [event for event, _ in told]
    assert events[0] == "selftrain.run.started"
    assert events[-1] == "selftrain.run.done"
    stages = [p["stage"] for e, p in told if e == "selftrain.run.progress" and "done" not in p]
    first = ["train", "validate", "test", "label", "select", "train", "validate", "test", "promote"]
    assert stages[: len(first)] == first
    rounds = list(range(1, len(status["rounds"])))
    assert len(rounds) == 2, "two students, or there is nothing to compare"
    worse = [p for e, p in told if e == "selftrain.round.worse"]
    assert [p["round_index"] for p in worse] == rounds
    assert (worse[0]["difference"], worse[0]["interval"]) == (-0.25, [-0.4, -0.1])
    collapses = [p for e, p in told if e == "selftrain.round.collapse"]
    # The first round has none to be compared with.
    assert [(p["round_index"], p["signs"]) for p in collapses] == [(2, ["a sign"])]

    told.clear()
    self_training(config)
    # All is reused, and nothing is told a second time.
    assert [event for event, _ in told] == ["selftrain.run.started", "selftrain.run.done"]
