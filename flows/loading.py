"""From a YAML file, a recipe's name and `--set` overrides to a validated config."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast, get_args

import yaml
from pydantic import BaseModel, ValidationError

from flows.config import SelfTrainingConfig

RECIPES_FOLDER = Path(__file__).parent / "recipes"


class ConfigError(ValueError):
    """A config that was refused; the message lists every key at fault."""


def recipe_names() -> list[str]:
    """Return the names of the recipes that ship with selftrain, sorted."""
    return sorted(path.stem for path in RECIPES_FOLDER.glob("*.yaml"))


def load_config(
    source: str, *, overrides: Sequence[str] = (), name: str | None = None
) -> SelfTrainingConfig:
    """Read a config and check all of it.

    Args:
        source: path of a YAML file, or the name of a recipe.
        overrides: `dotted.key=value`, the value in YAML; later ones win.
        name: the run's name, in place of the config's own.
    Raises: ConfigError naming every key at fault, its value and the rule.
    """
    document = _read_document(source)
    for override in overrides:
        _apply_override(document, override)
    if name is not None:
        document["name"] = name
    return parse_config(document, where=source)


def override_config(
    config: SelfTrainingConfig, overrides: Sequence[str], *, where: str
) -> SelfTrainingConfig:
    """Return a config of `where` with `dotted.key=value` overrides; raises ConfigError."""
    document = config.model_dump(mode="json", by_alias=True)
    for override in overrides:
        _apply_override(document, override)
    return parse_config(document, where=where)


def parse_config(document: dict[str, Any], *, where: str) -> SelfTrainingConfig:
    """Validate a config that was read from `where`; raises ConfigError."""
    try:
        return SelfTrainingConfig.model_validate(document)
    except ValidationError as error:
        raise ConfigError(_readable(error, document, where=where)) from None


def _read_document(source: str) -> dict[str, Any]:
    path = Path(source)
    if source in recipe_names():
        path = RECIPES_FOLDER / f"{source}.yaml"
    elif not path.is_file():
        raise ConfigError(
            f"config {source!r} is neither a file nor a recipe."
            f" Recipes: {', '.join(recipe_names())}"
        )
    try:
        document = yaml.load(path.read_text(encoding="utf-8"), Loader=StrictLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: not valid YAML: {error}") from None
    if not isinstance(document, dict):
        raise ConfigError(
            f"{source}: expected a mapping of config keys, found {type(document).__name__}"
        )
    return _unshared(document)


class StrictLoader(yaml.SafeLoader):
    """The safe loader, which besides refuses a key that is written twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuse the second of two equal keys."""
        written: set[str] = set()
        for key, _ in node.value:
            name = str(key.value)
            if name in written:
                raise yaml.constructor.ConstructorError(
                    problem=f"the key {name!r} is written twice", problem_mark=key.start_mark
                )
            written.add(name)
        return super().construct_mapping(node, deep)


def _unshared(node: Any) -> Any:
    """Return a copy in which a YAML alias is an object of its own, so that --set changes one."""
    if isinstance(node, dict):
        return {key: _unshared(value) for key, value in node.items()}
    return [_unshared(value) for value in node] if isinstance(node, list) else node


def _apply_override(document: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {override}: expected dotted.key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override}: the value is not valid YAML: {error}") from None
    *parents, leaf = key.split(".")
    node: Any = document
    for depth, parent in enumerate(parents):
        child = node.get(parent)
        if child is None:
            child = node[parent] = {}
        if not isinstance(child, dict):
            where = ".".join(parents[: depth + 1])
            raise ConfigError(f"--set {override}: {where} is {child!r}, not a group of keys")
        node = child
    # A union is replaced by writing its kind: keys of the old branch would only be refused.
    if leaf == "kind" and node.get("kind") != value:
        node.clear()
    node[leaf] = value


def _readable(error: ValidationError, document: dict[str, Any], *, where: str) -> str:
    lines = [f"{where}: {error.error_count()} problem(s) in the config"]
    for problem in error.errors(include_url=False):
        key = ".".join(str(part) for part in _as_written(problem["loc"], document))
        rule = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            rule = f"unknown key; known here: {', '.join(_known_keys(problem['loc'][:-1]))}"
        elif problem["type"] == "union_tag_not_found":
            rule = f"needs a kind, one of {', '.join(_known_kinds(problem['loc']))}"
        value = "" if isinstance(problem["input"], dict) else f" = {problem['input']!r}"
        lines.append(f"  {key or '(whole config)'}{value}: {rule}")
    return "\n".join(lines)


def _as_written(location: tuple[int | str, ...], document: Any) -> list[int | str]:
    """Drop the union tags that pydantic puts into a location: users never wrote them."""
    written: list[int | str] = []
    node = document
    for position, part in enumerate(location):
        is_key = isinstance(node, dict) and part in node
        is_index = isinstance(node, list) and isinstance(part, int)
        if is_key or is_index:
            node = cast("Any", node)[part]
        elif position < len(location) - 1 or not isinstance(node, dict | list):
            continue
        written.append(part)
    return written


def _known_keys(location: tuple[int | str, ...]) -> list[str]:
    """Return the legal keys of the config section at a pydantic error location."""
    sections = _sections_at(location)
    return sorted({field.alias or n for s in sections for n, field in s.model_fields.items()})


def _known_kinds(location: tuple[int | str, ...]) -> list[str]:
    """Return the kinds of the union at a pydantic error location, in the order of the code."""
    return [section.model_fields["kind"].default for section in _sections_at(location)]


def _sections_at(location: tuple[int | str, ...]) -> list[type[BaseModel]]:
    """Return the models that a config section may be of, at a pydantic error location."""
    candidates: list[type[BaseModel]] = [SelfTrainingConfig]
    for part in location:
        fields = [c.model_fields[part] for c in candidates if part in c.model_fields]
        if fields:
            candidates = [m for field in fields for m in _models_in(field.annotation)]
        else:  # a union's tag: keep the branch that bears it
            tagged = [
                c
                for c in candidates
                if "kind" in c.model_fields and c.model_fields["kind"].default == part
            ]
            candidates = tagged or candidates
    return candidates


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models_in(part)]
