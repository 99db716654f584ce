"""`selftrain compare`: runs that share stages, and one that was judged on other images."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from flows.cli import app
from flows.comparing import ConfigDifference, RunComparison, compare_runs
from flows.config import SelfTrainingConfig
from flows.self_training import self_training
from flows.terminal_comparison import print_comparison
from storage.store import Store, open_store

MakeConfig = Callable[..., SelfTrainingConfig]


@pytest.fixture(scope="module")
def store(
    tmp_path_factory: pytest.TempPathFactory,
    prefect_api: str,
    trained_here: list[str],
    tiny_config: MakeConfig,
) -> Store:
    """A store with two runs that differ in their selection: `loose` and `strict`."""
    url = tmp_path_factory.mktemp("compared") / "store"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flows.views.write_report", lambda store, status, inputs: None)
        self_training(tiny_config(url, "rounds=1", name="loose"))
        strict = (
            "rounds=1",
            "selection={threshold: {kind: fixed, confidence: 0.6}, allow_collapse: true}",
            "loader_threads=1",
        )
        self_training(tiny_config(url, *strict, name="strict"))
    return open_store(str(url))


@pytest.fixture(scope="module")
def found(store: Store) -> RunComparison:
    return compare_runs(store, "loose", "strict")


def test_config_differences_are_named_by_key_machine_settings_apart(found: RunComparison) -> None:
    assert set(found.config) == {
        ConfigDifference("selection.threshold.confidence", (0.4, 0.6), False),
        ConfigDifference("selection.allow_collapse", (False, True), False),
        ConfigDifference("loader_threads", (None, 1), True),
    }
    assert all(first == second for first, second in found.inputs.values())


def test_teacher_and_its_stages_are_shared_and_cost_the_second_run_nothing(
    found: RunComparison,
) -> None:
    kinds = [one.kind for one in found.shared]
    # The baseline reads no selection, so it is shared as well.
    assert sorted(kinds) == sorted(
        ["train", "validate", "test", "label", "train", "validate", "test"]
    )
    assert (found.costs[0].stages, found.costs[0].reused) == (12, 0)
    assert (found.costs[1].stages, found.costs[1].reused) == (12, 7)
    shared = sum(one.device_seconds or 0 for one in found.shared)
    assert found.costs[1].reused_device_seconds == pytest.approx(shared)
    teacher = found.rounds[0]
    assert teacher.is_same
    assert teacher.test is not None
    assert (teacher.test.method, teacher.test.difference) == ("same_model", 0.0)


def test_students_are_compared_on_the_same_images_the_second_against_the_first(
    found: RunComparison,
) -> None:
    student = found.rounds[1]
    assert not student.is_same
    for split, difference in (("dev", student.dev), ("test", student.test)):
        first, second = (model[f"{split}_accuracy"] for model in student.models if model)
        assert difference is not None
        assert difference.method == "paired"
        assert difference.difference == pytest.approx(second - first)
        assert difference.interval[0] <= difference.difference <= difference.interval[1]
        assert difference.samples == (15, 15)
        assert difference.only is not None
        assert (difference.only[1] - difference.only[0]) / 15 == pytest.approx(second - first)


def test_order_of_the_runs_turns_every_difference_round(store: Store, found: RunComparison) -> None:
    turned = compare_runs(store, "strict", "loose").rounds[1]
    straight = found.rounds[1]
    assert turned.test is not None
    assert straight.test is not None
    assert turned.test.difference == pytest.approx(-straight.test.difference)
    assert turned.test.interval == pytest.approx(tuple(-x for x in straight.test.interval[::-1]))
    assert turned.test.only == (straight.test.only or ())[::-1]
    assert turned.test.p_value == straight.test.p_value


def test_other_images_are_compared_unpaired_even_under_the_same_keys(
    store: Store, tmp_path: Path, tiny_config: MakeConfig, lab: Any, corpora_folder: Path,
    trained_here: list[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("flows.views.write_report", lambda store, status, inputs: None)
    data = tmp_path / "data"
    shutil.copytree(corpora_folder, data)
    shutil.rmtree(data / "test")
    lab.write_split(data / "test", {"test-0": lab.images_of("t", 15, start=7000, hardness=0.7)})
    self_training(tiny_config(store.url, "rounds=1", name="elsewhere", data=data))
    teacher = compare_runs(store, "loose", "elsewhere")
    assert teacher.inputs["test"][0] != teacher.inputs["test"][1]
    student = teacher.rounds[1]
    # The same model on two test splits says nothing of two models.
    assert student.is_same
    against = compare_runs(store, "strict", "elsewhere").rounds[1]
    assert against.test is not None
    assert (against.test.method, against.test.only, against.test.p_value) == (
        "unpaired",
        None,
        None,
    )
    assert against.dev is not None
    assert against.dev.method == "paired"


def selftrain(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def test_json_is_all_of_stdout_and_has_the_documented_keys(store: Store) -> None:
    result = selftrain("compare", "loose", "strict", "--store", store.url, "--json")
    assert result.exit_code == 0
    answer = json.loads(result.stdout)
    assert set(answer) == {
        *("schema", "store", "runs", "states", "config", "inputs", "rounds", "baseline"),
        *("approvals", "result", "costs", "shared_stages"),
    }
    assert (answer["schema"], answer["runs"]) == (1, ["loose", "strict"])
    assert [one["round_index"] for one in answer["rounds"]] == [0, 1]
    assert set(answer["rounds"][1]["test"]) == {
        *("accuracies", "intervals", "difference", "interval", "method", "samples", "only"),
        "p_value",
    }
    assert answer["rounds"][0]["pseudo_labels"] == [None, None]


def test_tables_name_both_runs_what_differs_and_how_it_was_compared(store: Store) -> None:
    result = selftrain("compare", "loose", "strict", "--store", store.url)
    assert result.exit_code == 0
    for text in (
        *("selection.threshold.confidence", "loader_threads (machine)", "the same model"),
        *("paired, 15 images, p = ", "result (round", "1 label", "pseudo-labels", "device time"),
    ):
        assert text in result.stdout


@pytest.mark.parametrize(
    ("first", "second", "shown"),
    [
        (("accept", 0.9), None, ["accept, threshold 0.9", "n/a"]),
        (("accept", None), ("reject", None), ["accept", "reject"]),
        (("accept", None), None, []),
        (("accept", 0.9), ("accept", 0.9), []),
    ],
)
def test_answers_of_people_are_named_where_the_runs_went_on_otherwise_by_them(
    found: RunComparison, capsys: pytest.CaptureFixture[str], first: Any, second: Any, shown: Any
) -> None:
    def given(answer: tuple[str, float | None] | None) -> list[dict[str, Any]]:
        if answer is None:
            return []
        return [{"round_index": 1, "answer": answer[0], "threshold": answer[1], "by": "ada"}]

    print_comparison(replace(found, approvals=(given(first), given(second))))

    rows = [line for line in capsys.readouterr().out.splitlines() if "answer in round 1" in line]
    assert len(rows) == bool(shown)
    assert all(text in row for row in rows for text in shown)


def test_unknown_run_is_wrong_usage_and_names_the_known_ones(store: Store) -> None:
    result = selftrain("compare", "loose", "stirct", "--store", store.url)
    assert result.exit_code == 2
    assert "strict" in result.stderr
