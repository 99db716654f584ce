"""Nightly runs under the last model of another run: only new shards are labelled, or nothing is."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows.config import SelfTrainingConfig
from flows.run_status import read_status
from flows.self_training import self_training
from storage.runs import read_events
from storage.store import open_store

pytestmark = pytest.mark.usefixtures("prefect_api", "trained_here")


@pytest.mark.slow
def test_a_night_labels_the_new_shards_and_a_night_without_any_computes_nothing(
    tiny_config: Callable[..., SelfTrainingConfig],
    trained_here: list[str],
    corpora_folder: Path,
    tmp_path: Path,
    lab: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn: list[str] = []
    monkeypatch.setattr(
        "flows.views.write_report", lambda store, status, inputs: drawn.append(status["run"])
    )
    monkeypatch.setattr("flows.artifacts.show_figures", lambda store, status: None)
    folder, data = tmp_path / "store", tmp_path / "data"
    store = open_store(str(folder))
    shutil.copytree(corpora_folder, data)
    short = ["rounds=1", "baseline=false"]
    self_training(tiny_config(folder, *short, name="weekly", data=data))
    weekly = read_status(store, "weekly")

    def night(day: int) -> Any:
        name = f"nightly-2026010{day}t020000z"
        latest = "teacher={kind: latest_promoted, of: weekly}"
        config = tiny_config(folder, *short, latest, name=name, data=data)
        state = self_training(config, return_state=True)
        return state, read_status(store, name)

    _, first = night(1)
    assert first.rounds[0].fingerprint == weekly.model_fingerprint()
    assert first.stages_computed == 6, "all but the teacher's validation and test"
    predicted = _predictions(folder)
    new = data / "unlabeled" / "unlabeled-new.tar"
    lab.write_shard(new, lab.images_of("n", 10, start=8000, labeled=False))

    state, second = night(2)

    assert second.rounds[0].fingerprint == weekly.model_fingerprint()
    added = _predictions(folder) - predicted
    assert len(added) == 2, "a file and a record of one shard"
    assert state.message == "all rounds done"
    num_trained, num_drawn = len(trained_here), len(drawn)

    state, third = night(3)

    assert state.name == "Completed"
    assert state.message == "nothing new: every stage was in the store; all rounds done"
    assert third.stages_computed == 0
    assert third.model_url == second.model_url
    assert len(trained_here) == num_trained
    assert len(drawn) == num_drawn + 1, "one report, at the end"
    end = read_events(store, third.run)[-1]
    assert (end["type"], end["stages_computed"]) == ("run_done", 0)


def _predictions(folder: Path) -> set[Path]:
    return {path for path in (folder / "predictions").rglob("*") if path.is_file()}
