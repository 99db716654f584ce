"""The config: what is refused and with which words, the ladder, and what enters fingerprints."""

import pytest
from pydantic import ValidationError

from flows.config import SelfTrainingConfig
from flows.data_config import DigitsData, ShardsData
from flows.trained_models import GivenTeacher, TrainedTeacher
from models.architectures import SmallCnnConfig
from models.objectives import JointConfig
from models.training import TrainingConfig
from storage.addresses import settings_of

TRAINING = {
    "architecture": {"kind": "small_cnn", "width": 4},
    "image_size": 8,
    "batch_size": 6,
    "duration": {"steps": 12},
}
DOCUMENT = {
    "name": "tiny",
    "rounds": 2,
    "data": {"labeled": "l", "dev": "d", "unlabeled": "u"},
    "teacher": TRAINING,
    "student": TRAINING,
}


def parse(**changes):
    return SelfTrainingConfig.model_validate(DOCUMENT | changes)


def test_untagged_data_are_shards_and_an_untagged_teacher_is_trained():
    config = parse()
    assert isinstance(config.data, ShardsData)
    assert isinstance(config.teacher, TrainedTeacher)
    assert config.teacher.unlabeled_ratio == 0
    assert config.student is not None
    assert config.student.unlabeled_ratio == 3


def test_a_tag_chooses_the_other_kind():
    config = parse(
        data={"kind": "digits", "labels_per_class": 2},
        teacher={"kind": "given", "model": "models/abc"},
    )
    assert config.data == DigitsData(labels_per_class=2)
    assert config.teacher == GivenTeacher(model="models/abc")


def test_the_document_that_was_validated_is_not_changed():
    before = repr(DOCUMENT)
    parse()
    assert repr(DOCUMENT) == before


def test_a_config_that_is_dumped_and_read_is_the_same():
    config = parse(student=TRAINING | {"ladder": [{"image_size": 16}]})
    stored = config.model_dump(mode="json", by_alias=True)
    assert stored["schema"] == 1
    assert SelfTrainingConfig.model_validate(stored) == config


def test_a_config_cannot_be_changed():
    with pytest.raises(ValidationError, match="frozen"):
        parse().rounds = 5  # type: ignore[misc]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nmae": "x"}, "Extra inputs are not permitted"),
        ({"schema": 2}, "Input should be 1"),
        ({"name": "Upper"}, "String should match pattern"),
        ({"name": "../escape"}, "String should match pattern"),
        ({"name": "a" * 64}, "String should match pattern"),
        ({"rounds": -1}, "greater than or equal to 0"),
        (
            {"rounds": 0},
            "rounds=0 trains the teacher alone, so student, baseline cannot take effect",
        ),
        ({"student": None}, "student is missing: rounds=2 students are to be trained"),
        ({"data": {"labeled": "l", "dev": "d"}}, "data.unlabeled is missing"),
        ({"seed": -1}, "greater than or equal to 0"),
        ({"seed": 2**32}, "less than 4294967296"),
        ({"max_bad_samples": -1}, "greater than or equal to 0"),
        ({"teacher": TRAINING | {"unlabeled_ratio": 3}}, "Input should be 0"),
        ({"student": TRAINING | {"unlabeled_ratio": 0}}, "greater than or equal to 1"),
        ({"student": TRAINING | {"duration": {"steps": 3, "samples_seen": 4}}}, "exactly one of"),
        ({"selection": {"threshold": {"confidence": 1.5}}}, "less than or equal to 1"),
        ({"selection": {"balance": {"kind": "best"}}}, "does not match any of the expected tags"),
        # -1 would cut a shard into no batches at all.
        ({"labeling": {"batch_size": -1}}, "greater than or equal to 1"),
        ({"labeling": {"shards_per_task": 0}}, "greater than or equal to 1"),
        ({"device": "tpu"}, "Input should be 'auto', 'cpu' or 'cuda'"),
        ({"stop": {"patience_rounds": 0}}, "greater than or equal to 1"),
        (
            {"student": TRAINING | {"ladder": [{"image_size": 16}] * 3}},
            "student.ladder has 3 steps but the run has rounds=2: steps beyond the last round would"
            " never be used. Shorten the ladder or raise rounds",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(changes, message):
    with pytest.raises(ValidationError) as caught:
        parse(**changes)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        # Each of these would be found by the first stage that it concerns, after hours of others.
        ("student", {"warmup": {"steps": 12}}, "warmup"),
        ("teacher", {"warmup": {"steps": 13}}, "warmup"),
        ("student", {"noise": {"crop": {"kind": "pad_shift", "pixels": 8}}}, "pixels"),
    ],
)
def test_a_training_that_cannot_run_is_refused_before_anything_is_computed(
    section, changes, message
):
    with pytest.raises(ValidationError, match=message):
        parse(**{section: TRAINING | changes})


def test_a_ladder_step_that_cannot_run_is_refused_too():
    ladder = [{"image_size": 8}]
    noise = {"crop": {"kind": "pad_shift", "pixels": 10}}
    student = TRAINING | {"image_size": 16, "noise": noise, "ladder": ladder}
    with pytest.raises(ValidationError, match="pixels"):
        parse(student=student)


def test_the_ladder_changes_rounds_and_its_last_step_holds():
    ladder = [
        {},
        {"architecture": {"kind": "small_cnn", "width": 8}, "unlabeled_ratio": 5},
        {"image_size": 16},
    ]
    student = parse(rounds=5, student=TRAINING | {"ladder": ladder}).student
    assert student is not None
    first, second, third, fourth = (student.for_round(i) for i in (1, 2, 3, 4))
    assert first.architecture == SmallCnnConfig(width=4)
    assert (first.image_size, first.unlabeled_ratio) == (8, 3)
    assert second.architecture == SmallCnnConfig(width=8)
    assert (second.image_size, second.unlabeled_ratio) == (8, 5)
    # A step changes the student's own values, not those of the step before.
    assert third.architecture == SmallCnnConfig(width=4)
    assert (third.image_size, third.unlabeled_ratio) == (16, 3)
    assert fourth == third


def test_a_students_training_is_what_a_training_config_of_its_own_would_be():
    student = parse(student=TRAINING | {"ladder": [{"image_size": 16}]}).student
    assert student is not None
    plain = student.for_round(1)
    direct = TrainingConfig.model_validate(TRAINING | {"image_size": 16})
    assert type(plain) is TrainingConfig
    assert plain == direct
    assert settings_of(plain) == settings_of(direct)
    teacher = parse().teacher
    assert isinstance(teacher, TrainedTeacher)
    assert settings_of(teacher.training()) == settings_of(
        TrainingConfig.model_validate(TRAINING | {"unlabeled_ratio": 0})
    )


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"store": "s3://key:hidden-word@bucket/store"}, "store"),
        ({"data": {**DOCUMENT["data"], "dev": "s3://key:hidden-word@bucket/d.tar"}}, "data.dev"),
        ({"data": {**DOCUMENT["data"], "root": "https://hidden-word@host"}}, "data.root"),
        ({"teacher": {"kind": "given", "model": "s3://a:hidden-word@b/models/1"}}, "teacher.model"),
        ({"extra_teachers": {"models": ["m", "s3://a:hidden-word@b/m"]}}, "extra_teachers.models"),
    ],
)
def test_credentials_in_a_url_are_refused_before_anything_keeps_them(changes, key):
    with pytest.raises(ValidationError) as refused:
        parse(**changes)
    (error,) = refused.value.errors()
    assert f"{key}: a URL that holds credentials" in error["msg"]
    assert "hidden-word" not in error["msg"]


def test_an_at_sign_in_a_path_is_no_credential():
    names = {"labeled": "s3://bucket/me@home/l", "dev": "/data/x@y", "unlabeled": "file://a@b/u"}
    data = parse(data=names).data
    assert isinstance(data, ShardsData)
    assert data.labeled == "s3://bucket/me@home/l"


def test_every_field_of_the_run_is_described():
    # Prefect shows the config as a form; a field without words is a riddle there.
    fields = {n: f for n, f in SelfTrainingConfig.model_fields.items() if n != "schema_version"}
    sections = {"data", "teacher", "student", "labeling", "selection", "stop"}
    assert [n for n, f in fields.items() if not f.description and n not in sections] == []


FINETUNE = {"duration": {"steps": 3}, "optimizer": {"kind": "sgd", "lr": 0.001}, "batch_size": 6}
FIX = FINETUNE | {"image_size": 16}
FIXMATCH = TRAINING | {"objective": {"kind": "fixmatch"}}
DISTILLED = TRAINING | {"objective": {"kind": "distillation"}}
WIDER = {"architecture": {"kind": "small_cnn", "width": 8, "depth": 1}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student": TRAINING | {"finetune": FINETUNE}}, "order=joint has no stage on labels"),
        (
            {"student": TRAINING | {"order": "finetune_on_labels_last"}},
            "order=finetune_on_labels_last ends on labels alone: describe that stage in finetune",
        ),
        (
            {"student": FIXMATCH | {"order": "pretrain_then_finetune", "finetune": FINETUNE}},
            "objective.kind=fixmatch reads none: use objective.kind: joint",
        ),
        (
            {"student": TRAINING | {"resolution_fix": FINETUNE}},
            "student.resolution_fix.image_size=None must be above image_size=8",
        ),
        (
            {"teacher": TRAINING | {"resolution_fix": FIX | {"image_size": 8}}},
            "teacher.resolution_fix.image_size=8 must be above image_size=8",
        ),
        (
            # High enough for the first student, not for the second.
            {"student": TRAINING | {"resolution_fix": FIX, "ladder": [{}, {"image_size": 16}]}},
            "student.ladder, step 2.resolution_fix.image_size=16 must be above image_size=16",
        ),
        (
            {"student": TRAINING | {"accumulation_steps": 3, "resolution_fix": FIX}
             | {"resolution_fix": FIX | {"batch_size": 4}}},
            "student.resolution_fix: Value error, 4 labeled images a step",
        ),
        ({"teacher": TRAINING | {"init": {"kind": "teacher"}}}, "'teacher' found using 'kind'"),
        (
            {"student": TRAINING | WIDER | {"init": {"kind": "teacher"}}},
            "a student is a small_cnn-8x1 and the teacher before it a small_cnn-4x",
        ),
        (
            {"student": TRAINING | {"init": {"kind": "pretrained", "weights": "w.pth"},
                                    "ladder": [{}, WIDER]}},
            "student.init.kind=pretrained takes weights over, but a student is a small_cnn-8x1",
        ),
        (
            {"student": DISTILLED | {"image_size": 16}},
            "the teacher of round 1, made for 8 pixels, the student's own views of 16",
        ),
        (
            {"student": DISTILLED, "teacher": TRAINING | {"resolution_fix": FIX}},
            "the teacher of round 1, made for 16 pixels, the student's own views of 8",
        ),
        (
            # The first student's fix makes it a teacher of 16 pixels.
            {"student": DISTILLED | {"resolution_fix": FIX}},
            "the teacher of round 2, made for 16 pixels",
        ),
        ({"student": FIXMATCH}, "a student with objective.kind=fixmatch reads nothing of its"),
        (
            {"rounds": 1, "student": FIXMATCH, "selection": {"target": "hard"}},
            "kind=fixmatch reads no stored pseudo-labels, so selection cannot take effect",
        ),
        (
            {"rounds": 1, "student": FIXMATCH, "labeling": {"precision": "bf16"}},
            "reads no stored pseudo-labels, so labeling cannot take effect",
        ),
        (
            {"rounds": 0, "student": None, "baseline": False, "selection": {"target": "hard"}},
            "rounds=0 trains the teacher alone, so selection cannot take effect",
        ),
    ],
)  # fmt: skip
def test_what_cannot_take_effect_or_fit_together_is_refused(changes, message):
    with pytest.raises(ValidationError) as caught:
        parse(**changes)
    assert message in str(caught.value)


def test_stages_after_a_training_stand_in_their_order():
    student = parse(
        student=TRAINING
        | {"order": "finetune_on_labels_last", "finetune": FINETUNE, "resolution_fix": FIX}
    ).student
    assert student is not None
    assert [role for role, _ in student.followers()] == ["finetune", "resolution_fix"]
    assert student.for_round(1).objective == JointConfig()


def test_pretraining_reads_pseudo_labels_alone_in_every_round():
    student = parse(
        student=TRAINING
        | {"order": "pretrain_then_finetune", "finetune": FINETUNE, "ladder": [{}, WIDER]}
    ).student
    assert student is not None
    for round_index in (1, 2):
        objective = student.for_round(round_index).objective
        assert isinstance(objective, JointConfig)
        assert not objective.labeled_images


def test_a_run_without_rounds_needs_neither_student_nor_unlabelled_data():
    config = parse(rounds=0, student=None, baseline=False, data={"labeled": "l", "dev": "d"})
    assert config.student is None
    assert SelfTrainingConfig.model_validate(config.model_dump(mode="json")) == config


def test_an_online_student_may_go_on_from_its_teacher_for_several_rounds():
    config = parse(student=FIXMATCH | {"init": {"kind": "teacher"}})
    assert config.rounds == 2


@pytest.mark.parametrize(
    ("labeling", "threshold", "message"),
    [
        ({}, {"kind": "uncertainty"}, r"set labeling\.uncertainty"),
        ({"view": {"kind": "hflip"}}, {"kind": "uncertainty"}, r"set labeling\.uncertainty"),
        ({}, {"kind": "agreement"}, "one prediction is made of each image"),
        ({"uncertainty": {"kind": "teachers"}}, {"kind": "fixed"}, "several teachers"),
        ({"aggregate": "mean_logit"}, {"kind": "fixed"}, "nothing to aggregate"),
        (
            {"view": {"kind": "multi_scale", "scales": [0.5, 1]}},
            {"kind": "fixed"},
            "images of 4 pixels to a network made for 8",
        ),
    ],
)
def test_labels_that_cannot_be_made_or_read_are_refused(labeling, threshold, message):
    with pytest.raises(ValidationError, match=message):
        parse(labeling=labeling, selection={"threshold": threshold})


def test_views_are_checked_at_the_size_that_a_model_ends_with():
    view = {"kind": "multi_scale", "scales": [0.5, 1]}
    fix = {
        "duration": {"steps": 1},
        "batch_size": 6,
        "image_size": 16,
        "optimizer": {"kind": "adamw"},
    }
    larger = TRAINING | {"resolution_fix": fix}
    # The last student labels nothing.
    parse(rounds=1, labeling={"view": view}, teacher=larger)
    with pytest.raises(ValidationError, match="images of 4 pixels"):
        parse(rounds=2, labeling={"view": view}, teacher=larger)
    parse(rounds=2, labeling={"view": view}, teacher=larger, student=larger)


def test_dropout_that_no_teacher_was_trained_with_is_asked_for_before_the_run():
    passes = {"uncertainty": {"kind": "mc_dropout"}}
    with_dropout = TRAINING | {"noise": {"dropout": 0.2}}
    with pytest.raises(ValidationError, match="of a teacher that labels has none"):
        parse(labeling=passes, student=with_dropout)
    with pytest.raises(ValidationError, match="of a student that labels has none"):
        parse(labeling=passes, teacher=with_dropout)
    parse(labeling=passes, teacher=with_dropout, student=with_dropout)
    # The last student labels nothing; a rate of one's own holds for all.
    parse(labeling=passes, teacher=with_dropout, rounds=1)
    parse(labeling={"uncertainty": {"kind": "mc_dropout", "rate": 0.5}})
    # A stage on labels that trains without dropout comes last.
    finetune = {"duration": {"steps": 1}, "batch_size": 6, "optimizer": {"kind": "adamw"}}
    ended = with_dropout | {"order": "finetune_on_labels_last", "finetune": finetune}
    with pytest.raises(ValidationError, match="last training of a student"):
        parse(labeling=passes, teacher=with_dropout, student=ended)
