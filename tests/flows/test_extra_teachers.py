"""An ensemble of teachers inside a run: what it labels, and who is told of it."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from flows.cli import app
from flows.config import SelfTrainingConfig
from flows.graph import ModelRef, RunGraph
from flows.labeling import label_corpus
from flows.opening import Pins, open_run
from flows.planning import plan_run
from flows.run_status import RunStatus, read_status
from flows.self_training import self_training
from models.noise import NoiseConfig
from storage.corpus import load_corpus
from storage.predictions import prediction_record, read_predictions
from storage.store import Store
from tasks.classifiers import UnknownModel
from tasks.specifications import finished_result
from tasks.teacher_views import Shown

TRAINING = {
    "architecture": {"kind": "small_cnn", "width": 4, "depth": 1},
    "image_size": 8,
    "batch_size": 6,
    "duration": {"steps": 12},
}
PINS = Pins("1" * 64, "2" * 64, None, "4" * 64, ("red", "green", "blue"))
OTHER = Shown(16, 4, "bicubic")
X, Y = "a" * 64, "b" * 64


def config(**changes: Any) -> SelfTrainingConfig:
    document: dict[str, Any] = {
        "name": "tiny",
        "rounds": 3,
        "data": {"labeled": "l", "dev": "d", "unlabeled": "u"},
        "teacher": TRAINING,
        "student": TRAINING,
    }
    return SelfTrainingConfig.model_validate(document | changes)


def graph(*given: str, earlier_rounds: int = 0, **changes: Any) -> RunGraph:
    extra = {"models": list(given), "earlier_rounds": earlier_rounds}
    pins = replace(PINS, extra_teachers=given)
    views = dict.fromkeys(given, OTHER)
    return RunGraph(config(extra_teachers=extra, **changes), pins, extra_views=views)


def chain(run: RunGraph) -> list[ModelRef]:
    """The teachers of rounds 1, 2 and 3, all students promoted."""
    models = [run.first_model()]
    for round_index in (1, 2):
        models.append(run.student_model(models[-1], round_index))
    return models


def test_the_rounds_teacher_comes_first_then_earlier_ones_the_newest_first_then_given_ones():
    run = graph(X, Y, earlier_rounds=1)
    first, second, third = chain(run)
    assert list(run.teachers(first)) == [first.fingerprint, X, Y]
    assert list(run.teachers(second)) == [second.fingerprint, first.fingerprint, X, Y]
    assert list(run.teachers(third)) == [third.fingerprint, second.fingerprint, X, Y]
    assert run.teachers(third)[second.fingerprint] == second.view
    assert run.teachers(third)[X] == OTHER
    whole = graph(earlier_rounds=9)
    models = chain(whole)
    assert list(whole.teachers(models[2])) == [one.fingerprint for one in models[::-1]]


def test_extra_teachers_change_labels_and_what_comes_of_them_alone(
    fingerprints_of: Callable[[RunGraph], dict[str, str]],
) -> None:
    plain = fingerprints_of(graph())
    for run, changed in (
        (graph(X), {"1", "2", "3", "baseline"}),
        (graph(earlier_rounds=1), {"2", "3", "baseline"}),
    ):
        found = fingerprints_of(run)
        assert set(found) == set(plain)
        different = {name for name in found if found[name] != plain[name]}
        # Labels make students, and so models; round 0 and a first round without extras stay.
        assert {name.split()[0] for name in different} <= changed
        first = sorted(changed)[0]
        assert {f"{first} labeler", f"{first} label", f"{first} select"} <= different


def test_nothing_but_the_set_of_teachers_and_what_they_are_shown_enters() -> None:
    one, other = graph(X, Y), graph(Y, X)
    teacher = one.first_model()
    assert one.label(teacher) == other.label(teacher)
    assert one.label(teacher) != graph(X).label(teacher)
    assert one.label(teacher) != replace(
        one, extra_views={X: OTHER, Y: Shown(8, 0, "bilinear")}
    ).label(teacher)
    itself = graph(teacher.fingerprint)
    assert itself.label(teacher) == graph().label(teacher), "a teacher counts once"


def test_an_ensemble_is_calibrated_by_dev_as_it_labels_it() -> None:
    run = graph(earlier_rounds=1)
    first, second, _ = chain(run)
    assert run.calibration(first) == run.evaluate("validate", first)
    assert not run.labels_dev(first)
    dev = run.calibration(second)
    assert run.labels_dev(second)
    assert (dev.kind, dev.inputs["corpus"]) == ("label", PINS.dev)
    assert dev.inputs["labeler"] == run.labeler(second)
    assert run.select(second, 2).inputs["validation"] == dev.fingerprint


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {
                "extra_teachers": {"earlier_rounds": 2},
                "labeling": {"uncertainty": {"kind": "teachers"}},
            },
            r"round 1: labeling\.uncertainty=teachers is a deviation over teachers",
        ),
        (
            {"extra_teachers": {"earlier_rounds": 2}, "labeling": {"aggregate": "mean_logit"}},
            r"round 1: labeling\.aggregate=mean_logit: one prediction",
        ),
        (
            {
                "extra_teachers": {"earlier_rounds": 2},
                "selection": {"threshold": {"kind": "agreement"}},
            },
            r"round 1: selection\.threshold=agreement counts votes",
        ),
        (
            {"rounds": 0, "student": None, "baseline": False, "extra_teachers": {"models": [X]}},
            "rounds=0 trains the teacher alone, so extra_teachers cannot take effect",
        ),
        (
            {
                "student": TRAINING | {"objective": {"kind": "fixmatch"}},
                "rounds": 1,
                "extra_teachers": {"models": [X]},
            },
            "reads no stored pseudo-labels, so extra_teachers cannot take effect",
        ),
    ],
    ids=["uncertainty", "aggregate", "agreement", "no rounds", "online"],
)
def test_what_an_ensemble_could_not_give_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_rules_on_several_predictions_take_teachers_for_them() -> None:
    config(
        extra_teachers={"models": [X]},
        labeling={"uncertainty": {"kind": "teachers"}, "aggregate": "mean_logit"},
        selection={"threshold": {"kind": "uncertainty"}, "calibration": "none"},
    )


# ------------------------------------------------------------------------- a run's own teachers


def opened(lab: Any, *models: str, **changes: Any) -> Pins:
    data = {"root": str(lab.folder), "labeled": "labeled", "dev": "dev", "unlabeled": "unlabeled"}
    wanted = config(data=data, extra_teachers={"models": list(models)}, **changes)
    return open_run(lab.store, wanted).pins


def test_extra_teachers_are_pinned_by_their_fingerprints(pipeline: Any, lab: Any) -> None:
    teacher = pipeline.teacher.fingerprint
    shutil.copytree(Path(pipeline.lab.store.url) / "models", Path(lab.store.url) / "models")
    names = (f"models/{teacher}", teacher, f"{lab.store.url}/models/{teacher}")
    assert opened(lab, *names).extra_teachers == (teacher,)


def test_extra_teachers_that_cannot_label_are_refused_before_anything_is_computed(
    lab: Any,
) -> None:
    with pytest.raises(UnknownModel, match="no finished model"):
        opened(lab, X)
    with pytest.raises(ValueError, match=r"extra_teachers\.models = /elsewhere.* lies outside"):
        opened(lab, f"/elsewhere/models/{X}")
    teacher = lab.train(lab.order(lab.config(noise=NoiseConfig()))).fingerprint
    dropout = {"uncertainty": {"kind": "mc_dropout"}}
    noisy = TRAINING | {"noise": {"dropout": 0.2}}
    with pytest.raises(ValueError, match=rf"extra_teachers\.models: {teacher}: .*without dropout"):
        opened(lab, teacher, labeling=dropout, teacher=noisy, student=noisy)


def test_a_run_labels_with_its_ensemble_and_says_so(
    prefect_api: str,
    trained_here: list[str],
    tiny_config: Callable[..., SelfTrainingConfig],
    tmp_path: Path,
    lab: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("flows.views.write_report", lambda store, status, inputs: None)
    given = lab.train(lab.order(seed=5)).fingerprint
    store = lab.store
    run = tiny_config(
        store.url,
        f"extra_teachers={{models: ['{given}'], earlier_rounds: 1}}",
        "baseline=false",
        "selection.allow_collapse=true",
    )

    self_training(run)

    status = read_status(store, run.name)
    models = [one.fingerprint for one in status.rounds]
    expected = [[models[0], given], [models[1], models[0], given]]
    for round_index, teachers in enumerate(expected, start=1):
        kinds = [stage["kind"] for stage in status.rounds[round_index].stages]
        assert kinds[:3] == ["label", "label", "select"], "dev, then the corpus"
        _is_the_mean(store, status, round_index, teachers)
    planned = [stage for stage in plan_run(store, run) if stage.kind == "label"]
    assert [list(stage.teachers or ()) for stage in planned] == [
        teachers for teachers in expected for _ in ("dev", "corpus")
    ]
    assert {stage.state for stage in planned} == {"reused"}
    shown = CliRunner().invoke(
        app, ["explain", run.name, "unlabeled-0/u003", "--store", store.url, "--json"]
    )
    rounds = json.loads(shown.stdout)["rounds"]
    found = [[one["fingerprint"] for one in told["teachers"]] for told in rounds]
    assert found == expected
    assert [one["round_index"] for one in rounds[1]["teachers"]] == [1, 0, None]
    assert {one["architecture"] for one in rounds[1]["teachers"]} == {"small_cnn-4x1"}
    # Of three votes.
    assert any(rounds[1]["agreement"] == pytest.approx(n / 3) for n in (1, 2, 3))


def _is_the_mean(store: Store, status: RunStatus, round_index: int, teachers: list[str]) -> None:
    """The round's predictions are those that the teachers' own labellings have for their mean."""
    label = status.rounds[round_index].stages[1]["fingerprint"]
    labeling = finished_result(store, "label", label)
    corpus = load_corpus(store, labeling.inputs["corpus"].fingerprint)
    shard = corpus.shards[0]
    together = read_predictions(
        store, prediction_record(store, labeling.inputs["labeler"].fingerprint, shard.digest)
    )
    alone: list[Any] = []
    for teacher in teachers:
        reference: Any = label_corpus(
            store=store.url,
            model=teacher,
            corpus=corpus.digest,
            class_names=["red", "green", "blue"],
        )
        own = finished_result(store, "label", reference["fingerprint"])
        record = prediction_record(store, own.inputs["labeler"].fingerprint, shard.digest)
        alone.append(np.exp(read_predictions(store, record).log_probs.astype(np.float64)))
    mean = np.mean(alone, axis=0)
    np.testing.assert_allclose(np.exp(together.log_probs.astype(np.float64)), mean, atol=3e-3)
