"""The fingerprint of every stage of every recipe: a changed line is a decision.

A fingerprint that changes throws the finished work of that stage away in every store. Where that is
meant, write the file anew and explain the changed lines in the commit:

    python -m pytest tests/flows/test_fingerprints.py --update-golden
"""

import hashlib

import pytest

from flows.data_config import ShardsData
from flows.graph import RunGraph
from flows.loading import load_config, recipe_names
from flows.opening import Pins
from flows.trained_models import GivenTeacher
from tasks.teacher_views import Shown

NUM_CLASSES = 10


def digest(name):
    return hashlib.sha256(name.encode()).hexdigest()


def fake_graph(recipe):
    """The recipe's stages on corpora that are known by name only, all students promoted."""
    config = load_config(recipe)
    is_given = isinstance(config.teacher, GivenTeacher)
    has_test = not isinstance(config.data, ShardsData) or config.data.test is not None
    pins = Pins(
        labeled=digest("labeled"),
        dev=digest("dev"),
        test=digest("test") if has_test else None,
        unlabeled=digest("unlabeled"),
        class_names=tuple(f"c{i}" for i in range(NUM_CLASSES)),
        given_teacher=digest("given") if is_given else None,
    )
    return RunGraph(config, pins, Shown(32, 0, "bilinear") if is_given else None)


@pytest.fixture(scope="module")
def both(golden, fingerprints_of):
    """What the recipes give now, and what is stored."""
    current = {name: fingerprints_of(fake_graph(name)) for name in recipe_names()}
    return current, golden("fingerprints", current)


def test_every_recipe_is_stored(both):
    current, stored = both
    assert set(current) == set(stored) == set(recipe_names())


@pytest.mark.parametrize("recipe", recipe_names())
def test_no_fingerprint_of_a_recipe_has_changed(both, recipe):
    current, stored = both
    assert sorted(current[recipe]) == sorted(stored[recipe])
    changed = [name for name, fp in current[recipe].items() if stored[recipe][name] != fp]
    assert not changed, f"{recipe}: {', '.join(changed)}; if it is meant: --update-golden"


@pytest.mark.parametrize("recipe", recipe_names())
def test_no_two_stages_of_a_recipe_share_a_fingerprint(both, recipe):
    current, _ = both
    assert len(set(current[recipe].values())) == len(current[recipe])
