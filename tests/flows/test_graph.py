"""The graph of a run: which stage depends on what, and on nothing else."""

from dataclasses import replace

import pytest

from flows.config import SelfTrainingConfig
from flows.graph import RunGraph, View
from flows.opening import Pins

TRAINING = {
    "architecture": {"kind": "small_cnn", "width": 4, "depth": 1},
    "image_size": 8,
    "batch_size": 6,
    "duration": {"steps": 12},
}
PINS = Pins("1" * 64, "2" * 64, "3" * 64, "4" * 64, ("a", "b", "c"))

TEACHER = {"0 teacher", "0 validate", "0 test"}
LABEL_1 = {"1 label"}
FROM_SELECT_1 = {
    *("1 select", "1 student", "1 validate", "1 test", "1 promote"),
    *("2 labeler", "2 label", "2 select", "2 student", "2 validate", "2 test", "2 promote"),
}
BASELINE = {"baseline train", "baseline validate", "baseline test"}
ALL = TEACHER | {"1 labeler"} | LABEL_1 | FROM_SELECT_1 | BASELINE
TESTS = {name for name in ALL if name.endswith(" test")}
VALIDATES = {name for name in ALL if name.endswith(" validate")}
PROMOTES = {"1 promote", "2 promote"}


def graph(pins=PINS, **changes):
    document = {
        "name": "tiny",
        "rounds": 2,
        "data": {"labeled": "l", "dev": "d", "test": "t", "unlabeled": "u"},
        "teacher": TRAINING,
        "student": TRAINING,
    }
    return RunGraph(SelfTrainingConfig.model_validate(document | changes), pins)


@pytest.fixture(scope="module")
def changed(fingerprints_of):
    """Return the stages that differ between two graphs of the same stages."""

    def names(first, second):
        before, after = fingerprints_of(first), fingerprints_of(second)
        assert set(before) == set(after)
        return {name for name, fingerprint in before.items() if after[name] != fingerprint}

    return names


def test_a_run_has_these_stages(fingerprints_of):
    assert set(fingerprints_of(graph())) == ALL
    assert set(fingerprints_of(graph(baseline=False))) == ALL - BASELINE
    without_test = graph(replace(PINS, test=None))
    assert set(fingerprints_of(without_test)) == ALL - TESTS


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "other"},
        {"store": "/elsewhere"},
        {"device": "cpu"},
        {"max_bad_samples": 5},
        {"stop": {"patience_rounds": 1}},
        {"labeling": {"batch_size": 8, "shards_per_task": 1}},
        {"selection": {"allow_collapse": True, "max_class_share": 0.9}},
        {"data": {"root": "s3://b", "labeled": "x", "dev": "y", "test": "z", "unlabeled": "w"}},
        {"teacher": TRAINING | {"checkpoint_every_steps": 5}},
        {"student": TRAINING | {"checkpoint_every_seconds": 5}},
        # Written out or left to the default: the same.
        {"student": TRAINING | {"unlabeled_ratio": 3, "ladder": []}},
    ],
)
def test_what_changes_no_result_changes_no_fingerprint(changed, changes):
    assert changed(graph(), graph(**changes)) == set()


STUDENT = {"2 labeler", *FROM_SELECT_1} - {"1 select"} | BASELINE


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"seed": 1}, ALL),
        ({"teacher": TRAINING | {"duration": {"steps": 13}}}, ALL - BASELINE),
        ({"student": TRAINING | {"duration": {"steps": 13}}}, STUDENT),
        ({"student": TRAINING | {"unlabeled_ratio": 4}}, STUDENT),
        ({"labeling": {"precision": "bf16"}}, {"1 labeler"} | LABEL_1 | FROM_SELECT_1),
        ({"selection": {"target": "hard"}}, FROM_SELECT_1),
        ({"selection": {"threshold": {"confidence": 0.9}}}, FROM_SELECT_1),
        (
            {"student": TRAINING | {"ladder": [{}, {"unlabeled_ratio": 5}]}},
            {"2 student", "2 validate", "2 test", "2 promote"} | BASELINE,
        ),
    ],
)
def test_a_setting_changes_the_stages_behind_it(changed, changes, expected):
    assert changed(graph(), graph(**changes)) == expected


NO_CALIBRATION = {"selection": {"calibration": "none"}}


@pytest.mark.parametrize(
    ("pins", "changes", "expected"),
    [
        # Nothing reads the test split.
        (replace(PINS, test="9" * 64), {}, TESTS),
        # Dev calibrates the selection and judges; it trains and labels nothing in round 1.
        (replace(PINS, dev="9" * 64), {}, FROM_SELECT_1 | VALIDATES),
        (replace(PINS, dev="9" * 64), NO_CALIBRATION, VALIDATES | PROMOTES),
        # A corpus that grew keeps the labeler, so only its new shards are labelled.
        (replace(PINS, unlabeled="9" * 64), {}, LABEL_1 | FROM_SELECT_1),
        (replace(PINS, labeled="9" * 64), {}, ALL),
        (replace(PINS, class_names=("b", "a", "c")), {}, ALL),
    ],
)
def test_an_input_changes_the_stages_that_read_it(changed, pins, changes, expected):
    assert changed(graph(**changes), graph(pins, **changes)) == expected


def test_the_name_of_every_stage_is_its_own(fingerprints_of):
    found = fingerprints_of(graph())
    assert len(set(found.values())) == len(found)


def test_nothing_has_a_test_evaluation_as_input():
    run = graph()
    model = run.first_model()
    tested = run.evaluate("test", model).fingerprint
    student = run.student_model(model, 1)
    specifications = [
        run.label(model),
        run.select(model, 1),
        run.student(model, 1)[0],
        run.promote(model, student),
        run.baseline(2)[0],
        run.evaluate("validate", student),
    ]
    for specification in specifications:
        assert tested not in specification.inputs.values()
        assert PINS.test not in specification.inputs.values()


def test_the_student_learns_from_its_teachers_selection():
    run = graph()
    teacher = run.first_model()
    specification, config = run.student(teacher, 1)
    assert specification.inputs == {
        "labeled": PINS.labeled,
        "selection": run.select(teacher, 1).fingerprint,
    }
    assert specification.settings["role"] == "student"
    assert specification.settings["round_index"] == 1
    assert config.unlabeled_ratio == 3
    assert run.select(teacher, 1).inputs["labeling"] == run.label(teacher).fingerprint
    assert run.label(teacher).inputs == {
        "labeler": run.labeler(teacher),
        "corpus": PINS.unlabeled,
    }


def test_a_student_that_is_not_promoted_leaves_the_teacher_where_it_was(fingerprints_of):
    # Round 2 with the first teacher again has a selection of its own, but needs no new labels.
    run = graph()
    teacher = run.first_model()
    assert run.label(teacher) == run.label(teacher)
    assert run.select(teacher, 1).fingerprint != run.select(teacher, 2).fingerprint


def test_the_baseline_is_the_last_students_network_on_labels_alone():
    ladder = [{}, {"architecture": {"kind": "small_cnn", "width": 8, "depth": 1}}]
    run = graph(student=TRAINING | {"ladder": ladder})
    for last_round, width in ((1, 4), (2, 8)):
        specification, config = run.baseline(last_round)
        assert config.architecture.kind == "small_cnn"
        assert config.architecture.width == width
        assert config.batch_size == 6 * 4
        assert config.unlabeled_ratio == 0
        assert specification.inputs == {"labeled": PINS.labeled}
        assert specification.settings["role"] == "baseline"


def test_each_model_is_evaluated_and_labels_under_its_own_view():
    run = graph(student=TRAINING | {"image_size": 16, "interpolation": "bicubic"})
    teacher = run.first_model()
    student = run.student_model(teacher, 1)
    assert teacher.view == View(8, 0, "bilinear")
    assert student.view == View(16, 0, "bicubic")
    assert run.evaluate("test", student).settings["view"] == student.view.to_json()
    assert run.evaluate("test", teacher).settings["view"] == teacher.view.to_json()


def test_a_given_teacher_is_trained_by_nobody():
    pins = replace(PINS, given_teacher="7" * 64)
    given = graph(pins, teacher={"kind": "given", "model": f"models/{'7' * 64}"})
    run = replace(given, given_view=View(32, 4, "bicubic"))
    assert run.teacher() is None
    model = run.first_model()
    assert (model.fingerprint, model.view, model.round_index) == (
        "7" * 64,
        View(32, 4, "bicubic"),
        0,
    )
    assert run.evaluate("validate", model).inputs["model"] == "7" * 64
    assert graph().teacher() is not None
