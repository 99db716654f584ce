"""Words for the form that the Prefect UI makes of a config: its choices are named as in YAML."""

from collections.abc import Callable
from typing import Any

from pydantic.json_schema import JsonSchemaValue

_KIND = "What was chosen above, as a config writes it; leave it as it is."


def title_by_kind(
    schema: JsonSchemaValue, resolve: Callable[[JsonSchemaValue], JsonSchemaValue]
) -> None:
    """Title every model below a JSON schema as users know it, in place.

    The form shows one tab for each model of a union, under the model's title: by default the name
    of a class, so that the tabs of the architectures are wider than the page. Here it is the value
    of `kind`, as a config says `kind: small_cnn`, and for models without one the name of the class
    without `Config`. Fields without a title get one.

    Args:
        schema: of a model, as pydantic's handler returns it.
        resolve: returns the schema that a `$ref` stands for.
    """
    _visit(schema, resolve, seen=set())


def _visit(
    value: Any, resolve: Callable[[JsonSchemaValue], JsonSchemaValue], seen: set[str]
) -> None:
    if isinstance(value, list):
        for one in value:
            _visit(one, resolve, seen)
    if not isinstance(value, dict):
        return
    if "$ref" in value:
        if value["$ref"] in seen:
            return
        seen.add(value["$ref"])
        value = resolve(value)
    if value.get("type") == "object" and isinstance(value.get("title"), str):
        kind = value.get("properties", {}).get("kind", {})
        if "const" in kind:
            kind["description"] = _KIND
        value["title"] = kind.get("const", value["title"].removesuffix("Config"))
        for name, field in value.get("properties", {}).items():
            # Of a model that may be null pydantic makes none, and the form says "Field".
            field.setdefault("title", name.replace("_", " ").title())
    for one in value.values():
        _visit(one, resolve, seen)
