"""A config that `selftrain init` wrote, planned and run as it is, but for shorter trainings."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from flows.cli import app
from tasks.digits import prepare_digits, read_digits

# Durations and nothing else: what init chose beside them is what is tried. The warm-ups of its
# 300 steps, 15, fit into these.
SHORTER = [
    *["--set", "teacher.duration.steps=40"],
    *["--set", "student.duration.steps=30"],
]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.usefixtures("prefect_api"),
]


@pytest.fixture(autouse=True)
def _own_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SELFTRAIN_STORE", "store")


def test_the_config_for_a_folder_of_images_runs_to_its_end() -> None:
    num_of_class: Counter[str] = Counter()
    for image in read_digits():
        assert image.label is not None
        number, label = num_of_class[image.label], image.label
        num_of_class[label] += 1
        # The first 24 of each digit lie in its folder, the next 36 directly in `digits`.
        if number < 60:
            folder = Path("digits", label) if number < 24 else Path("digits")
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{label}-{number:03d}.png").write_bytes(image.load())

    made = _json("init", "digits")

    # 240 labels, of which a fifth goes to dev: too few to fit a temperature on.
    samples = {split: facts["samples"] for split, facts in made["splits"].items()}
    assert samples == {"labeled": 192, "dev": 48, "unlabeled": 360}
    _plan_and_run(rounds=made["choices"]["rounds"]["value"])


def test_the_config_for_an_indexed_corpus_runs_to_its_end() -> None:
    prepare_digits("shards", labels_per_class=20, dev=100, test=100, shard_size=100, seed=0)
    for split in ("labeled", "unlabeled"):
        _json("data", "index", f"shards/{split}", "--out", f"{split}.json")

    made = _json(
        *["init", "unlabeled.json", "--labels", "labeled.json"],
        *["--dev", "shards/dev", "--test", "shards/test"],
    )

    # 1,797 digits in all.
    samples = {split: facts["samples"] for split, facts in made["splits"].items()}
    assert samples == {"labeled": 200, "dev": 100, "test": 100, "unlabeled": 1397}
    status = _plan_and_run(rounds=made["choices"]["rounds"]["value"])
    assert all(one["test_accuracy"] is not None for one in status["rounds"])


def _plan_and_run(*, rounds: int) -> dict[str, Any]:
    planned = _json("plan", "mine.yaml", *SHORTER)
    kinds = Counter(stage["kind"] for stage in planned["stages"])
    # The teacher, a student a round, and the baseline.
    assert (kinds["train"], kinds["label"], kinds["select"]) == (rounds + 2, rounds, rounds)
    assert planned["warnings"] == []

    status = _json("run", "mine.yaml", *SHORTER)

    assert status["state"] == "done"
    assert status["stop_reason"] in ("max_rounds", "no_gain")
    assert len(status["rounds"]) >= 2, "a student was trained, and its labels were selected"
    assert status["rounds"][1]["pseudo_labels"]["kept"] > 0
    assert status["rounds"][0]["dev_accuracy"] > 0.2, "ten classes: chance is 0.1"
    return status


def _json(*arguments: str) -> dict[str, Any]:
    result: Result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, (result.output, result.exception)
    return json.loads(result.stdout)
