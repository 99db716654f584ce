"""Canonical JSON, settings and fingerprints: golden literals and what must not change them."""

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field

from storage import addresses
from storage.addresses import canonical_json, fingerprint, settings_of, sha256_hex


class Noise(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Literal["cutout"] = "cutout"
    fraction: float = 0.5
    smooth: bool = Field(default=False, json_schema_extra={"absent_means": False})


class Training(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    learning_rate: float = 0.1
    steps: int = 100
    betas: tuple[float, float] = (0.9, 0.999)
    noise: Noise | None = None
    techniques: tuple[Noise, ...] = ()
    by_name: dict[str, Noise] = {}
    workers: int = Field(default=4, json_schema_extra={"fingerprint": "excluded"})
    clip: float | None = Field(default=None, json_schema_extra={"absent_means": None})


def test_canonical_json_is_this_text():
    value = {"b": [1, 1.0, -0.5, True, None], "a": {"é": "\n", "A": 1e22}, "empty": ()}
    # Keys sorted by code point ("A" before "é"), no spaces, UTF-8, floats as repr.
    assert canonical_json(value) == (
        '{"a":{"A":1e+22,"é":"\\n"},"b":[1,1.0,-0.5,true,null],"empty":[]}'.encode()
    )


def test_fingerprint_is_this_literal():
    # sha256 of {"inputs":{"teacher":"ab"},"kind":"label","settings":{"k":1},"version":2},
    # worked out with sha256sum.
    assert fingerprint("label", 2, {"k": 1}, {"teacher": "ab"}) == (
        "4fc8acab73a20fb5a03a8c09a479c6ab353904f90cb9e3aea6ab39c2436b9ea5"
    )


def test_sha256_of_abc_is_the_published_one():
    assert sha256_hex(b"abc") == (
        "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )


@pytest.mark.parametrize(
    "other",
    [
        ("train", 2, {"k": 1}, {"teacher": "ab"}),
        ("label", 3, {"k": 1}, {"teacher": "ab"}),
        ("label", 2, {"k": 1.0}, {"teacher": "ab"}),
        ("label", 2, {"k": 1}, {"teacher": "ac"}),
        ("label", 2, {"k": 1}, {"student": "ab"}),
    ],
)
def test_every_part_of_a_specification_changes_its_fingerprint(other: Any):
    assert fingerprint(*other) != fingerprint("label", 2, {"k": 1}, {"teacher": "ab"})


def test_fingerprint_refuses_an_empty_input():
    with pytest.raises(ValueError, match="input 'teacher' has an empty fingerprint"):
        fingerprint("label", 1, {}, {"teacher": ""})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_canonical_json_refuses_numbers_that_json_lacks_and_names_the_place(value: float):
    with pytest.raises(ValueError, match=r"value\.a\[1\] is"):
        canonical_json({"a": [0, value]})


@pytest.mark.parametrize("value", [Path("x"), b"x", {1, 2}, np.float64(1), np.int64(1), object()])
def test_canonical_json_refuses_unknown_types(value: object):
    with pytest.raises(TypeError, match=r"value\.a is a"):
        canonical_json({"a": value})


def test_canonical_json_refuses_keys_that_are_no_strings():
    with pytest.raises(TypeError, match="key 1 is a int, not a string"):
        canonical_json({1: "a"})


@pytest.mark.parametrize(
    "text", ['{"b": [1, 2.50, {"z": null, "a": true}], "a": "\u00fc"}', "[]", '"x"', "1e-7", "3"]
)
def test_canonical_json_of_parsed_is_canonical_json(text: str):
    value = json.loads(text)
    assert addresses.canonical_json_of_parsed(value) == canonical_json(value)


@pytest.mark.parametrize("text", ['{"a": 1e999}', '{"a": "\\ud800"}'])
def test_canonical_json_of_parsed_refuses_what_canonical_json_refuses(text: str):
    with pytest.raises(ValueError, match=r"JSON|surrogate"):
        addresses.canonical_json_of_parsed(json.loads(text))


def test_canonical_json_refuses_half_a_surrogate_pair():
    with pytest.raises(ValueError, match="not valid Unicode"):
        canonical_json("\ud800")


@given(
    st.dictionaries(
        st.text(st.characters(codec="utf-8")),
        st.integers()
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.booleans()
        | st.none(),
    )
)
def test_canonical_json_does_not_depend_on_the_order_of_keys(value: dict[str, Any]):
    backwards = dict(reversed(list(value.items())))
    assert canonical_json(value) == canonical_json(backwards)


def test_settings_are_written_in_full_without_excluded_and_absent_fields():
    assert settings_of(Training(noise=Noise(), workers=9)) == {
        "learning_rate": 0.1,
        "steps": 100,
        "betas": [0.9, 0.999],
        "noise": {"kind": "cutout", "fraction": 0.5},
        "techniques": [],
        "by_name": {},
    }


def test_settings_keep_an_added_option_that_is_used_in_nested_places():
    settings = settings_of(
        Training(clip=1.0, techniques=(Noise(smooth=True), Noise()), by_name={"x": Noise()})
    )
    assert settings["clip"] == 1.0
    assert settings["techniques"] == [
        {"kind": "cutout", "fraction": 0.5, "smooth": True},
        {"kind": "cutout", "fraction": 0.5},
    ]
    assert settings["by_name"] == {"x": {"kind": "cutout", "fraction": 0.5}}


def test_absent_false_is_not_the_number_zero():
    class Counted(BaseModel):
        number: int = Field(default=0, json_schema_extra={"absent_means": False})

    assert settings_of(Counted()) == {"number": 0}


def test_absent_means_a_nested_model_at_its_old_values():
    class Outer(BaseModel):
        noise: Noise = Field(
            default=Noise(),
            json_schema_extra={"absent_means": {"kind": "cutout", "fraction": 0.5}},
        )

    assert settings_of(Outer()) == {}
    assert settings_of(Outer(noise=Noise(fraction=0.25))) == {
        "noise": {"kind": "cutout", "fraction": 0.25}
    }


def test_a_misspelt_fingerprint_mark_is_an_error():
    class Wrong(BaseModel):
        workers: int = Field(default=1, json_schema_extra={"fingerprint": "exclude"})

    with pytest.raises(TypeError, match=r"Wrong\.workers: fingerprint mark is 'exclude'"):
        settings_of(Wrong())


def test_a_set_has_no_order_to_fingerprint():
    class WithSet(BaseModel):
        names: frozenset[str] = frozenset({"a"})

    with pytest.raises(TypeError, match=r"WithSet\.names is a set"):
        settings_of(WithSet())


def test_a_field_that_is_never_stored_must_be_marked_excluded():
    class Hidden(BaseModel):
        secret: int = Field(default=1, exclude=True)

    with pytest.raises(TypeError, match=r"Hidden\.secret is not serialised"):
        settings_of(Hidden())


def test_folders_are_those_of_the_design():
    assert addresses.model_folder("f") == "models/f"
    assert addresses.labeling_folder("f") == "labelings/f"
    assert addresses.selection_folder("f") == "selections/f"
    assert addresses.evaluation_folder("f") == "evaluations/f"
    assert addresses.prediction_folder("f") == "predictions/f"
    assert addresses.corpus_path("f") == "corpora/f.json"
    assert addresses.run_folder("demo") == "runs/demo"


@pytest.mark.parametrize("name", ["", "..", "../x", "a/b", ".hidden", "a b", "x" * 201])
def test_names_that_could_leave_their_folder_are_refused(name: str):
    with pytest.raises(ValueError, match="cannot be part of a path"):
        addresses.run_folder(name)
