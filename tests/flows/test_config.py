"""The config: what is refused and with which words, the ladder, and what enters fingerprints."""

import pytest
from pydantic import ValidationError

from flows.config import (
    DigitsData,
    GivenTeacher,
    SelfTrainingConfig,
    ShardsData,
    TrainedTeacher,
)
from models.architectures import SmallCnnConfig
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
        ({"rounds": 0}, "greater than or equal to 1"),
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
    plain = parse(student=TRAINING | {"ladder": [{"image_size": 16}]}).student.for_round(1)
    direct = TrainingConfig.model_validate(TRAINING | {"image_size": 16})
    assert type(plain) is TrainingConfig
    assert plain == direct
    assert settings_of(plain) == settings_of(direct)
    teacher = parse().teacher
    assert isinstance(teacher, TrainedTeacher)
    assert settings_of(teacher.training()) == settings_of(
        TrainingConfig.model_validate(TRAINING | {"unlabeled_ratio": 0})
    )


def test_every_field_of_the_run_is_described():
    # Prefect shows the config as a form; a field without words is a riddle there.
    fields = {n: f for n, f in SelfTrainingConfig.model_fields.items() if n != "schema_version"}
    sections = {"data", "teacher", "student", "labeling", "selection", "stop"}
    assert [n for n, f in fields.items() if not f.description and n not in sections] == []
