"""Canonical JSON, fingerprints of specifications, and the folders where they live."""

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

from pydantic import BaseModel

_SEGMENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=-]{0,199}")


def canonical_json(value: object) -> bytes:
    """Return the one JSON form of a value: sorted keys, no spaces, UTF-8.

    Integers and floats stay different (``1`` and ``1.0``); tuples are lists.

    Raises:
        ValueError: for NaN, infinities and text that UTF-8 cannot hold; the place is named.
        TypeError: for keys that are no strings and values that JSON does not know.
    """
    return canonical_json_of_parsed(_checked(value, "value"))


def canonical_json_of_parsed(value: object) -> bytes:
    """Return `canonical_json` of what JSON was parsed to, which holds nothing that JSON cannot.

    It takes a fraction of the time, and names no place in what it raises.

    Raises: ValueError for numbers beyond the floats, which are parsed to infinities, and for text
        that UTF-8 cannot hold.
    """
    return json.dumps(
        value,
        sort_keys=True,
        separators=(",", ":"),
        ensure_ascii=False,
        allow_nan=False,
    ).encode("utf-8")


def sha256_hex(data: bytes | bytearray | memoryview) -> str:
    """Return the SHA-256 of the bytes as 64 lower-case hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def settings_of(model: BaseModel) -> dict[str, Any]:
    """Return the JSON form of the settings that affect a result.

    Left out are fields marked ``json_schema_extra={"fingerprint": "excluded"}`` and fields whose
    value equals their ``json_schema_extra={"absent_means": V}``; nested models, lists and
    dictionaries are followed. All else is written in full, defaults included, so that changing a
    default changes the fingerprint and adding an option does not.

    Raises: TypeError for a field that has no stored form (``exclude=True``) or no order (a set).
    """
    dumped = model.model_dump(mode="json")
    fields = type(model).model_fields
    settings: dict[str, Any] = {}
    for name, field in fields.items():
        extra: object = field.json_schema_extra
        marks = cast("dict[str, Any]", extra) if isinstance(extra, dict) else {}
        mark = marks.get("fingerprint")
        if mark == "excluded":
            continue
        where = f"{type(model).__name__}.{name}"
        if mark is not None:
            raise TypeError(f'{where}: fingerprint mark is {mark!r}, but only "excluded" is known')
        if name not in dumped:
            raise TypeError(
                f"{where} is not serialised and so cannot be in a fingerprint; "
                'mark it json_schema_extra={"fingerprint": "excluded"}'
            )
        value = _settings_value(getattr(model, name), dumped[name], where)
        if "absent_means" in marks and canonical_json(value) == canonical_json(
            marks["absent_means"]
        ):
            continue
        settings[name] = value
    return settings


def fingerprint(
    kind: str, version: int, settings: Mapping[str, Any], inputs: Mapping[str, str]
) -> str:
    """Return the 64 hexadecimal digits that name a stage's specification.

    Args:
        kind: the stage, for example ``train``.
        version: the stage's version constant, at least 1.
        settings: the settings that affect the result (see `settings_of`), JSON only.
        inputs: role -> fingerprint or digest of what the stage reads.
    """
    if not kind or version < 1:
        raise ValueError(f"stage kind {kind!r} version {version}: kind is text, version at least 1")
    for role, name in inputs.items():
        if not name:
            raise ValueError(f"stage {kind}: input {role!r} has an empty fingerprint")
    return sha256_hex(
        canonical_json(
            {"kind": kind, "version": version, "settings": settings, "inputs": dict(inputs)}
        )
    )


def model_folder(fp: str) -> str:
    """Return the folder of a trained model."""
    return f"models/{_segment(fp)}"


def labeling_folder(fp: str) -> str:
    """Return the folder of a labelling of one corpus."""
    return f"labelings/{_segment(fp)}"


def selection_folder(fp: str) -> str:
    """Return the folder of a selection."""
    return f"selections/{_segment(fp)}"


def guard_folder(fp: str) -> str:
    """Return the folder of what the leak guard found in one corpus."""
    return f"guards/{_segment(fp)}"


def descriptor_folder(fp: str) -> str:
    """Return the folder of descriptors of one kind, shared by every corpus."""
    return f"descriptors/{_segment(fp)}"


def evaluation_folder(fp: str) -> str:
    """Return the folder of an evaluation."""
    return f"evaluations/{_segment(fp)}"


def compact_folder(fp: str) -> str:
    """Return the folder of a selection's compact shards."""
    return f"compact/{_segment(fp)}"


def prediction_folder(labeler: str) -> str:
    """Return the folder of a labeler's predictions, shared by every corpus."""
    return f"predictions/{_segment(labeler)}"


def corpus_path(digest: str) -> str:
    """Return the path of a corpus's description."""
    return f"corpora/{_segment(digest)}.json"


def run_folder(name: str) -> str:
    """Return the folder of a run's config, events and views."""
    return f"runs/{_segment(name)}"


def _segment(name: str) -> str:
    if not _SEGMENT.fullmatch(name):
        raise ValueError(
            f"{name!r} cannot be part of a path in the store: it must start with a letter or "
            "digit and hold only letters, digits, '.', '_', '=' and '-' (at most 200)"
        )
    return name


def _checked(value: object, where: str) -> object:
    if value is None or isinstance(value, bool):
        return value
    if type(value) is str:
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"{where}: {value!r} is not valid Unicode ({error.reason})") from None
        return value
    if type(value) is int:
        return value
    if type(value) is float:
        if not math.isfinite(value):
            raise ValueError(f"{where} is {value!r}; JSON holds finite numbers only")
        return value
    if isinstance(value, Mapping):
        checked: dict[str, object] = {}
        for key, item in cast("Mapping[object, object]", value).items():
            if type(key) is not str:
                raise TypeError(f"{where}: key {key!r} is a {type(key).__name__}, not a string")
            checked[key] = _checked(item, f"{where}.{key}")
        return checked
    if isinstance(value, (list, tuple)):
        items = cast("Sequence[object]", value)
        return [_checked(item, f"{where}[{index}]") for index, item in enumerate(items)]
    raise TypeError(
        f"{where} is a {type(value).__name__} ({value!r}); canonical JSON takes None, bool, int, "
        "float, str, lists, tuples and mappings only"
    )


def _settings_value(value: object, dumped: Any, where: str) -> Any:
    if isinstance(value, BaseModel):
        return settings_of(value)
    if isinstance(value, (set, frozenset)):
        raise TypeError(f"{where} is a set, which has no order to fingerprint; use a sorted tuple")
    if isinstance(value, (list, tuple)):
        items = cast("Sequence[object]", value)
        return [
            _settings_value(item, form, f"{where}[{index}]")
            for index, (item, form) in enumerate(zip(items, dumped, strict=True))
        ]
    if isinstance(value, Mapping):
        pairs = zip(
            cast("Mapping[object, object]", value).values(),
            cast("dict[str, Any]", dumped).items(),
            strict=True,
        )
        return {key: _settings_value(item, form, f"{where}.{key}") for item, (key, form) in pairs}
    return dumped
