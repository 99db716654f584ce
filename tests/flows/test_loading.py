"""From YAML, recipes and --set to a config; errors in the words of the file."""

import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from flows.config import SelfTrainingConfig
from flows.data_config import DigitsData, ShardsData
from flows.loading import ConfigError, load_config, parse_config, recipe_names
from flows.trained_models import GivenTeacher, TrainedTeacher
from models.balancing import TopKConfig
from models.noise import NoiseConfig
from models.thresholds import FixedThresholdConfig

DOCUMENT = """
name: tiny
rounds: 2
data: {labeled: l, dev: d, unlabeled: u}
teacher: &training
  architecture: {kind: small_cnn, width: 4}
  image_size: 8
  batch_size: 6
  duration: {steps: 12}
  noise: {dropout: 0.1}
student: *training
selection:
  threshold: {kind: fixed, confidence: 0.5}
  balance: {kind: ns_binned, k: 7}
"""


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(DOCUMENT)
    return str(path)


def _known(model: type[BaseModel]) -> str:
    return ", ".join(sorted(model.model_fields))


def refusal(source, *overrides):
    with pytest.raises(ConfigError) as caught:
        load_config(source, overrides=overrides)
    return str(caught.value)


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_a_valid_config(name):
    config = load_config(name)
    assert (config.student is None) == (config.rounds == 0)
    path = Path("flows/recipes") / f"{name}.yaml"
    assert yaml.safe_load((Path(__file__).parents[2] / path).read_text())["name"] == config.name


def test_the_demo_is_a_recipe():
    assert "demo" in recipe_names()
    assert isinstance(load_config("demo").data, DigitsData)


def test_a_name_may_be_given(source):
    assert load_config(source, name="other").name == "other"


def test_overrides_are_yaml_values_and_later_ones_win(source):
    config = load_config(
        source,
        overrides=[
            "rounds=3",
            "rounds=4",
            "student.optimizer={kind: adamw}",
            "student.optimizer.lr=1e-2",
            "student.noise={dropout: 0.5, horizontal_flip: false}",
            "student.ema=null",
            "student.ladder=[{image_size: 16}]",
            "store=s3://bucket/with=sign",
            "selection.threshold.confidence=0.25",
        ],
    )
    assert config.rounds == 4
    assert config.student is not None
    assert config.student.optimizer.lr == 0.01
    assert config.student.noise.dropout == 0.5
    assert not config.student.noise.horizontal_flip
    assert config.student.ema is None
    assert config.student.for_round(1).image_size == 16
    assert config.store == "s3://bucket/with=sign"
    assert config.selection.threshold == FixedThresholdConfig(confidence=0.25)


def test_an_override_of_one_section_does_not_change_another_that_shares_a_yaml_anchor(source):
    config = load_config(
        source, overrides=["student.batch_size=12", "student.noise.dropout=0.5", "student.ema=null"]
    )
    assert config.student is not None
    assert config.student.batch_size == 12
    assert config.student.noise.dropout == 0.5
    teacher = config.teacher
    assert teacher.kind == "train"
    assert teacher.batch_size == 6
    assert teacher.noise.dropout == 0.1
    assert teacher.ema is not None


def test_another_kind_replaces_the_whole_section(source):
    config = load_config(
        source,
        overrides=["selection.balance.kind=top_k", "teacher.kind=given", "teacher.model=models/a"],
    )
    # The k of ns_binned is gone with it.
    assert config.selection.balance.kind == "top_k"
    assert config.selection.balance.k == "median"
    assert config.teacher == GivenTeacher(model="models/a")


def test_the_same_kind_leaves_the_section_as_it_is(source):
    config = load_config(source, overrides=["selection.balance.kind=ns_binned"])
    assert config.selection.balance.kind == "ns_binned"
    assert config.selection.balance.k == 7


def test_sections_that_the_file_does_not_have_are_made(source):
    assert load_config(source, overrides=["stop.patience_rounds=2"]).stop.patience_rounds == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rounds", "--set rounds: expected dotted.key=value"),
        ("=3", "--set =3: expected dotted.key=value"),
        ("rounds=[1", "--set rounds=[1: the value is not valid YAML"),
        ("name.first=x", "--set name.first=x: name is 'tiny', not a group of keys"),
        (
            "student.batch_size.x.y=1",
            "--set student.batch_size.x.y=1: student.batch_size is 6, not a group of keys",
        ),
    ],
)
def test_an_override_that_cannot_be_read_says_what_is_expected(source, override, message):
    assert message in refusal(source, override)


def test_an_unknown_key_shows_its_path_and_the_known_ones(source):
    message = refusal(source, "student.noise.dropuot=0.3")
    assert f"{source}: 1 problem(s) in the config" in message
    expected = f"student.noise.dropuot = 0.3: unknown key; known here: {_known(NoiseConfig)}"
    assert expected in message


def test_known_keys_are_those_of_the_branch_that_was_chosen(source):
    message = refusal(source, "teacher.ladder=[]", "data.labels_per_class=3")
    # Union tags are not part of what users wrote.
    assert f"  teacher.ladder = []: unknown key; known here: {_known(TrainedTeacher)}" in message
    assert "teacher.train" not in message
    assert f"data.labels_per_class = 3: unknown key; known here: {_known(ShardsData)}" in message
    message = refusal(source, "selection.balance.kind=top_k", "selection.balance.q=1")
    assert f"selection.balance.q = 1: unknown key; known here: {_known(TopKConfig)}" in message


def test_an_unknown_key_at_the_top_shows_the_sections(source):
    message = refusal(source, "round=3")
    assert "  round = 3: unknown key; known here: alert, approve, baseline, cache, data," in message
    assert ", schema, " in message
    assert "schema_version" not in message


def test_keys_in_a_ladder_are_shown_with_their_step(source):
    message = refusal(source, "student.ladder=[{image_size: 8}, {size: 3}]")
    assert (
        "student.ladder.1.size = 3: unknown key; known here: architecture, image_size,"
        " unlabeled_ratio" in message
    )


def test_every_problem_is_listed_with_value_and_rule(source):
    message = refusal(source, "rounds=-1", "seed=abc", "student.duration={}", "student.image_size=")
    assert "4 problem(s)" in message
    assert "  rounds = -1: Input should be greater than or equal to 0" in message
    assert "  seed = 'abc': Input should be a valid integer" in message
    assert "  student.duration: a duration needs exactly one of steps" in message
    assert "  student.image_size = None: Input should be a valid integer" in message


def test_the_branches_of_a_value_are_not_part_of_its_path(source):
    message = refusal(source, "labeling.batch_size=0")
    assert "  labeling.batch_size = 0: Input should be greater than or equal to 1" in message
    assert "  labeling.batch_size = 0: Input should be 'auto'" in message
    assert "int" not in message


def test_a_missing_key_is_named(source, tmp_path):
    document = yaml.safe_load(DOCUMENT)
    del document["data"]["dev"]
    with pytest.raises(ConfigError, match=r"  data\.dev: Field required"):
        parse_config(document, where="test")


def test_an_unknown_kind_shows_the_known_ones(source):
    message = refusal(source, "selection.balance={kind: best}")
    assert "selection.balance" in message
    assert "'none', 'ns_binned', 'top_k'" in message
    message = refusal(source, "student.architecture={kind: vgg}")
    assert "'small_cnn', 'wide_resnet', 'resnet', 'efficientnet'" in message


def test_a_section_without_its_kind_shows_the_kinds(source):
    message = refusal(source, "student.optimizer.lr=0.1")
    assert "  student.optimizer: needs a kind, one of adamw, sgd, rmsprop_tf" in message


def test_a_contradiction_of_the_whole_config_is_said_in_words(source):
    message = refusal(source, "student.ladder=[{}, {}, {}]")
    assert "  (whole config): student.ladder has 3 steps but the run has rounds=2" in message


def test_a_source_that_is_nothing_lists_the_recipes(tmp_path):
    message = refusal(str(tmp_path / "absent.yaml"))
    assert "is neither a file nor a recipe. Recipes: " in message
    assert "demo" in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "not valid YAML"),
        ("- 1\n- 2", "expected a mapping of config keys, found list"),
        ("", "expected a mapping of config keys, found NoneType"),
        ("name: a\nrounds: 1\nname: b", "the key 'name' is written twice"),
    ],
)
def test_a_file_that_is_no_config_says_so(tmp_path, text, message):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    assert message in refusal(str(path))


def test_a_repeated_key_is_refused_at_any_depth_and_merge_keys_are_not(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(DOCUMENT.replace("image_size: 8", "image_size: 8\n  image_size: 9"))
    assert "the key 'image_size' is written twice" in refusal(str(path))
    path.write_text(DOCUMENT.replace("student: *training", "student: {<<: *training, seed: 1}"))
    assert "student.seed = 1: unknown key" in refusal(str(path))
    merged = "student: {<<: *training, batch_size: 9}"
    path.write_text(DOCUMENT.replace("student: *training", merged))
    student = load_config(str(path)).student
    assert student is not None
    assert student.batch_size == 9


def test_shards_may_be_named_by_any_url(source):
    data = load_config(source, overrides=["data.root=s3://b/prefix"]).data
    assert isinstance(data, ShardsData)
    assert data.root == "s3://b/prefix"


def _settings(kind: Any, seen: set[Any]) -> Iterator[str]:
    """Names of all keys below a type, members of unions included."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        if kind in seen:
            return
        seen.add(kind)
        for name, field in kind.model_fields.items():
            yield field.alias or name
            yield from _settings(field.annotation, seen)
    for part in typing.get_args(kind):
        yield from _settings(part, seen)


def test_every_setting_is_named_in_the_documentation():
    pages = (Path(__file__).parents[2] / "docs").glob("*.md")
    text = "\n".join(page.read_text() for page in pages)
    code = [*re.findall(r"`([^`\n]+)`", text), *re.findall(r"^ {4}.*$", text, re.MULTILINE)]
    named = {word for span in code for word in re.findall(r"\w+", span)}
    known = set(_settings(SelfTrainingConfig, set()))
    assert {"rounds", "frozen_fraction", "max_bytes", "trust_coefficient"} <= known
    assert sorted(known - named) == []
