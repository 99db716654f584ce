"""The graph of a run: which stage depends on what, and on nothing else."""

from dataclasses import replace
from typing import Any

import pytest

from flows.config import SelfTrainingConfig
from flows.graph import RunGraph
from flows.opening import Pins
from tasks.teacher_views import Shown
from tasks.training_orders import ImagesPerStep, images_per_step

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


def graph(pins: Pins = PINS, **changes: Any) -> RunGraph:
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
        ({"labeling": {"view": {"kind": "hflip"}}}, {"1 labeler"} | LABEL_1 | FROM_SELECT_1),
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


HFLIP: dict[str, Any] = {"labeling": {"view": {"kind": "hflip"}}}


def test_labels_are_calibrated_by_predictions_of_dev_that_are_made_alike():
    clean = graph()
    teacher = clean.first_model()
    assert clean.calibration(teacher) == clean.evaluate("validate", teacher)
    assert not clean.labels_dev(teacher)
    mirrored = graph(**HFLIP)
    dev = mirrored.calibration(teacher)
    assert (dev.kind, dev.inputs["corpus"]) == ("label", PINS.dev)
    assert dev.inputs["labeler"] == mirrored.labeler(teacher)
    assert mirrored.select(teacher, 1).inputs["validation"] == dev.fingerprint
    assert mirrored.labels_dev(teacher)


def test_dev_is_labelled_where_something_is_calibrated_by_it():
    def labels_dev(of: RunGraph) -> bool:
        return of.labels_dev(of.first_model())

    assert not labels_dev(graph(**HFLIP, selection={"calibration": "none"}))
    assert not labels_dev(graph(selection={"calibration": "none"}))
    one_random: dict[str, Any] = {"labeling": {"view": {"kind": "k_random", "k": 1}}}
    assert labels_dev(graph(**one_random))
    # The top_k form is calibrated before it is cut, by dev in full.
    top_k: dict[str, Any] = {"labeling": HFLIP["labeling"] | {"form": "top_k", "k": 2}}
    cut = graph(**top_k, selection={"calibration": "none"})
    assert labels_dev(cut)
    teacher = cut.first_model()
    assert cut.calibration(teacher).inputs["labeler"] == graph(**HFLIP).labeler(teacher)
    assert cut.calibration(teacher).inputs["labeler"] != cut.labeler(teacher)


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
        *(training.specification for training in run.student(model, 1)),
        run.promote(model, student),
        *(training.specification for training in run.baseline(2)),
        run.evaluate("validate", student),
    ]
    for specification in specifications:
        assert tested not in specification.inputs.values()
        assert PINS.test not in specification.inputs.values()


def test_the_student_learns_from_its_teachers_selection():
    run = graph()
    teacher = run.first_model()
    ((specification, config),) = run.student(teacher, 1)
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
        ((specification, config),) = run.baseline(last_round)
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
    assert teacher.view == Shown(8, 0, "bilinear")
    assert student.view == Shown(16, 0, "bicubic")
    assert run.evaluate("test", student).settings["view"] == student.view.to_json()
    assert run.evaluate("test", teacher).settings["view"] == teacher.view.to_json()


def test_a_given_teacher_is_trained_by_nobody():
    pins = replace(PINS, given_teacher="7" * 64)
    given = graph(pins, teacher={"kind": "given", "model": f"models/{'7' * 64}"})
    run = replace(given, given_view=Shown(32, 4, "bicubic"))
    assert run.teacher() == ()
    model = run.first_model()
    assert (model.fingerprint, model.view, model.round_index) == (
        "7" * 64,
        Shown(32, 4, "bicubic"),
        0,
    )
    assert run.evaluate("validate", model).inputs["model"] == "7" * 64
    assert [training.role for training in graph().teacher()] == ["teacher"]


FINETUNE = {"duration": {"steps": 3}, "optimizer": {"kind": "sgd", "lr": 0.001}, "batch_size": 6}
FIX = FINETUNE | {"image_size": 16, "frozen_fraction": 0.5}


def roles(trainings):
    return [training.role for training in trainings]


def test_stages_after_a_training_start_from_the_one_before_and_read_labels_alone():
    run = graph(
        student=TRAINING
        | {"order": "finetune_on_labels_last", "finetune": FINETUNE, "resolution_fix": FIX}
    )
    teacher = run.first_model()
    trainings = run.student(teacher, 1)
    student, finetune, fix = trainings

    assert roles(trainings) == ["student", "finetune", "resolution_fix"]
    assert "selection" in student.specification.inputs
    assert finetune.specification.inputs == {
        "labeled": PINS.labeled,
        "init": student.specification.fingerprint,
    }
    assert fix.specification.inputs["init"] == finetune.specification.fingerprint
    assert "frozen_fraction" not in finetune.specification.settings
    assert fix.specification.settings["frozen_fraction"] == 0.5
    # What is validated, labels the next round and is promoted is the last one, under its own view.
    model = run.student_model(teacher, 1)
    assert (model.fingerprint, model.view.image_size) == (fix.specification.fingerprint, 16)
    assert run.labeler(model) != run.labeler(run.first_model())
    assert [training.specification.settings["round_index"] for training in trainings] == [1, 1, 1]


def test_the_teachers_model_is_the_one_after_its_resolution_fix():
    run = graph(teacher=TRAINING | {"resolution_fix": FIX})
    trainings = run.teacher()
    assert roles(trainings) == ["teacher", "resolution_fix"]
    assert run.first_model().fingerprint == trainings[1].specification.fingerprint
    assert run.first_model().view.image_size == 16


def test_a_stage_after_the_training_leaves_the_training_itself_reusable(fingerprints_of):
    plain, fixed = graph(), graph(student=TRAINING | {"resolution_fix": FIX})
    before, after = fingerprints_of(plain), fingerprints_of(fixed)
    assert after["1 student"] == before["1 student"]
    assert after["1 validate"] != before["1 validate"]
    assert set(after) - set(before) == {
        "1 resolution_fix",
        "2 resolution_fix",
        "baseline resolution_fix",
    }


def test_pretraining_reads_no_labels_and_its_baseline_as_many_labels_as_it_pseudo_labels():
    run = graph(
        student=TRAINING
        | {"order": "pretrain_then_finetune", "finetune": FINETUNE, "unlabeled_ratio": 4}
    )
    teacher = run.first_model()
    pretraining, finetune = run.student(teacher, 1)
    assert images_per_step(pretraining.config) == ImagesPerStep(labeled=0, unlabeled=24)
    assert images_per_step(finetune.config) == ImagesPerStep(labeled=6, unlabeled=0)
    baseline, baseline_finetune = run.baseline(2)
    assert images_per_step(baseline.config) == ImagesPerStep(labeled=24, unlabeled=0)
    assert baseline.config.duration == pretraining.config.duration
    assert baseline_finetune.config == finetune.config
    assert baseline_finetune.specification.inputs["init"] == baseline.specification.fingerprint


def test_what_a_student_starts_from_is_an_input_of_its_training():
    by_kind = {
        "scratch": {},
        "teacher": {"init": graph().first_model().fingerprint},
        "model": {"init": "8" * 64},
        "pretrained": {"init_weights": "8" * 64},
    }
    more = {"model": {"model": "models/x"}, "pretrained": {"weights": "w.pth"}}
    for kind, expected in by_kind.items():
        init = {"kind": kind} | more.get(kind, {})
        pins = replace(PINS, student_init="8" * 64 if kind in more else None)
        run = graph(pins, student=TRAINING | {"init": init})
        (student,) = run.student(run.first_model(), 1)
        inputs = student.specification.inputs
        assert {n: v for n, v in inputs.items() if n.startswith("init")} == expected
        # The same lead for the baseline; where it is the teacher's, without pseudo-labels.
        (baseline,) = run.baseline(2)
        inputs = baseline.specification.inputs
        assert {n: v for n, v in inputs.items() if n.startswith("init")} == expected


def test_each_student_that_starts_from_its_teacher_starts_from_the_last_student():
    run = graph(student=TRAINING | {"init": {"kind": "teacher"}})
    first = run.student_model(run.first_model(), 1)
    (second,) = run.student(first, 2)
    assert second.specification.inputs["init"] == first.fingerprint


def test_a_teacher_may_start_from_pinned_weights():
    init = {"kind": "pretrained", "weights": "torchvision:DEFAULT"}
    run = graph(replace(PINS, teacher_init="8" * 64), teacher=TRAINING | {"init": init})
    assert run.teacher()[0].specification.inputs == {
        "labeled": PINS.labeled,
        "init_weights": "8" * 64,
    }


ONLINE: dict[str, Any] = {"rounds": 1, "student": TRAINING | {"objective": {"kind": "fixmatch"}}}
DISTILLED: dict[str, Any] = ONLINE | {"student": TRAINING | {"objective": {"kind": "distillation"}}}


def test_an_online_student_reads_the_corpus_itself_and_no_selection(fingerprints_of):
    run = graph(**ONLINE)
    (student,) = run.student(run.first_model(), 1)
    assert student.specification.inputs == {"labeled": PINS.labeled, "unlabeled": PINS.unlabeled}
    assert not any(
        name.split()[-1] in ("labeler", "label", "select") for name in fingerprints_of(run)
    )
    (baseline,) = run.baseline(1)
    assert baseline.specification.inputs == {"labeled": PINS.labeled}
    assert images_per_step(baseline.config) == ImagesPerStep(labeled=24, unlabeled=0)


def test_a_distilled_student_has_its_teacher_as_an_input(changed):
    run = graph(**DISTILLED)
    teacher = run.first_model()
    (student,) = run.student(teacher, 1)
    assert student.specification.inputs == {
        "labeled": PINS.labeled,
        "unlabeled": PINS.unlabeled,
        "teacher": teacher.fingerprint,
    }
    # Another teacher is another student; FixMatch's student does not know its teacher.
    longer: dict[str, Any] = {"teacher": TRAINING | {"duration": {"steps": 13}}}
    assert "1 student" in changed(graph(**DISTILLED), graph(**DISTILLED, **longer))
    assert "1 student" not in changed(graph(**ONLINE), graph(**ONLINE, **longer))


def test_a_corpus_that_grew_changes_the_online_student_too(changed):
    grown = replace(PINS, unlabeled="9" * 64)
    assert "1 student" in changed(graph(**ONLINE), graph(grown, **ONLINE))


def test_a_run_without_rounds_is_a_teacher_and_its_evaluations(fingerprints_of):
    run = graph(replace(PINS, unlabeled=None), rounds=0, student=None, baseline=False)
    assert set(fingerprints_of(run)) == TEACHER


def test_a_selection_that_could_not_use_its_labels_is_refused_before_labelling():
    many = replace(PINS, class_names=tuple(f"c{i}" for i in range(257)))
    vector = graph(many, selection={"calibration": "vector"})
    with pytest.raises(ValueError, match=r"label with labeling\.form=full"):
        vector.label(vector.first_model())
    full = graph(many, selection={"calibration": "vector"}, labeling={"form": "full"})
    full.label(full.first_model())


def test_labels_in_the_top_k_form_depend_on_the_teachers_validation():
    many = replace(PINS, class_names=tuple(f"c{i}" for i in range(257)))
    one, other = graph(many), graph(replace(many, dev="9" * 64))
    assert one.labeler(one.first_model()) != other.labeler(other.first_model())
    few, other = graph(), graph(replace(PINS, dev="9" * 64))
    assert few.labeler(few.first_model()) == other.labeler(other.first_model())
