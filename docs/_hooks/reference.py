"""Pages of the site that are made from the code: recipes, and the reference of config and CLI.

mkdocs.yml names this file under `hooks`; it is no page itself.
"""

import json
import re
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from flows.cli import app
from flows.config import SelfTrainingConfig
from flows.loading import RECIPES_FOLDER, recipe_names

Schema = Mapping[str, Any]

_MAX_DEFAULT_LENGTH = 80

_CONFIG_INTRODUCTION = """\
# Config reference

Every key of a run's config: what a YAML file, `--set` and Prefect's form take. Made from the code
of this version. `selftrain config mine.yaml` prints a config with all defaults filled in;
[methods](../methods.md) has formulas and sources.

A key without a default is required. Lengths are given in exactly one unit. Where several kinds are
possible, `kind` chooses, and each kind has keys of its own.
"""

_CLI_INTRODUCTION = """\
# Command line reference

Every command, made from the code of this version; `selftrain COMMAND --help` says the same.
[Interfaces](../interfaces.md) has exit codes and JSON forms.
"""

_RECIPES_INTRODUCTION = """\
# Recipes

Configs to start from. `selftrain run NAME` runs one, `selftrain config NAME > mine.yaml` writes it
down in full, defaults filled in; `--set KEY=VALUE` changes a key. Those of digits make their own
images and take minutes on two cores. [Methods](methods.md) has the rules behind them.
"""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put every decision into the navigation, which then need not be edited for a new one."""
    pages = sorted(Path(config.docs_dir, "decisions").glob("*.md"))
    for entry in config.nav or []:
        if isinstance(entry, dict) and "Decisions" in entry:
            entry["Decisions"] = [f"decisions/{page.name}" for page in pages]
    return config


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the generated pages to the site."""
    pages = {
        "recipes.md": recipes(),
        "reference/config.md": config_reference(),
        "reference/cli.md": cli_reference(),
    }
    for path, content in pages.items():
        files.append(File.generated(config, path, content=content))
    return files


def recipes() -> str:
    """Return the page of every recipe with its file."""
    parts = [_RECIPES_INTRODUCTION]
    for name in recipe_names():
        text = (RECIPES_FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
        lines = text.splitlines()
        num_comments = next(i for i, line in enumerate(lines) if not line.startswith("#"))
        comments = "\n".join(line.removeprefix("#").strip() for line in lines[:num_comments])
        body = "\n".join(lines[num_comments:])
        parts.append(f"\n## {name}\n\n{comments}\n\n```yaml\n{body}\n```")
    return "\n".join(parts)


def config_reference() -> str:
    """Return the page of every config key: a section for each model, in the order of the YAML."""
    schema = SelfTrainingConfig.model_json_schema(by_alias=True)
    definitions: dict[str, Schema] = schema["$defs"]
    places = _places(schema, definitions)
    parts = [_CONFIG_INTRODUCTION, *_section(["the run"], schema, places)]
    for name, found in places.items():
        parts += _section(found, definitions[name], places)
    return "\n".join(parts)


def cli_reference() -> str:
    """Return the page of every command with its arguments and options."""
    parts = [_CLI_INTRODUCTION]
    for path, command in _commands("selftrain", typer.main.get_command(app)):
        parts += _command_section(path, command)
    return "\n".join(parts)


def _places(schema: Schema, definitions: Mapping[str, Schema]) -> dict[str, list[str]]:
    """Return where each model is used, as dotted keys with their kind; in order of appearance."""
    places: dict[str, list[str]] = {}

    def visit(schema: Schema, prefix: str) -> None:
        for key, value in schema.get("properties", {}).items():
            for name in _references(value):
                kind = definitions[name].get("properties", {}).get("kind", {})
                choice = f", kind: {kind['const']}" if "const" in kind else ""
                place = f"{prefix}{key}{choice}"
                is_new = name not in places
                places.setdefault(name, []).append(place)
                if is_new:
                    visit(definitions[name], f"{prefix}{key}.")

    visit(schema, "")
    return places


def _references(schema: Any) -> list[str]:
    """Return the names of the models that a value may be, each once."""
    found: dict[str, None] = {}
    if isinstance(schema, Mapping):
        for key, value in schema.items():
            if key == "$ref":
                found[str(value).rpartition("/")[2]] = None
            elif key not in ("default", "discriminator"):
                found |= dict.fromkeys(_references(value))
    elif isinstance(schema, list):
        for one in schema:
            found |= dict.fromkeys(_references(one))
    return list(found)


def _section(found: list[str], schema: Schema, places: Mapping[str, list[str]]) -> Iterator[str]:
    """Return the lines on one model, which is found at these places."""
    title, *also = found
    yield f"\n## {title} {{ #{_anchor(title)} }}\n"
    yield _prose(schema.get("description", ""))
    if also:
        yield "\nAlso " + ", ".join(f"`{place}`" for place in also) + ".\n"
    properties = schema.get("properties", {})
    if not properties:
        yield "\nIt has no keys."
        return
    yield "\n| key | value | default | |\n|---|---|---|---|"
    for key, value in properties.items():
        is_required = key in schema.get("required", []) or "default" not in value
        default = "required" if is_required else _shown(value["default"])
        cells = [f"`{key}`", _type(value, places), default, _meaning(value)]
        yield "| " + " | ".join(_cell(cell) for cell in cells) + " |"


def _type(schema: Schema, places: Mapping[str, list[str]]) -> str:
    """Return what a value may be, in words, with links to the sections of models."""
    if "$ref" in schema:
        place = places[str(schema["$ref"]).rpartition("/")[2]][0]
        return f"[{place.rpartition(', kind: ')[2]}](#{_anchor(place)})"
    for alternatives in ("anyOf", "oneOf"):
        if alternatives in schema:
            return " or ".join(_type(one, places) for one in schema[alternatives])
    if "const" in schema:
        return f"`{_compact(schema['const'])}`"
    if "enum" in schema:
        return ", ".join(f"`{_compact(one)}`" for one in schema["enum"])
    match schema.get("type"):
        case "array":
            if "prefixItems" in schema:
                inner = ", ".join(_type(one, places) for one in schema["prefixItems"])
                return f"[{inner}]"
            return f"list of {_type(schema.get('items', {}), places)}"
        case "object":
            values = schema.get("additionalProperties")
            inner = _type(values, places) if isinstance(values, Mapping) else "anything"
            return f"map to {inner}"
        case "null":
            return "`null`"
        case None:
            return "anything"
        case kind:
            words = {"boolean": "true or false", "integer": "whole number", "string": "text"}
            return words.get(str(kind), str(kind)) + _bounds(schema)


def _bounds(schema: Schema) -> str:
    signs = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}
    bounds = [f"{sign} {schema[key]}" for key, sign in signs.items() if key in schema]
    if "pattern" in schema:
        bounds.append(f"matching `{schema['pattern']}`")
    return f" ({', '.join(bounds)})" if bounds else ""


def _meaning(schema: Schema) -> str:
    excluded = " In no fingerprint." if schema.get("fingerprint") == "excluded" else ""
    return _prose(schema.get("description", "")) + excluded


def _shown(default: Any) -> str:
    """Return a default for a cell; that of a large section is in the section."""
    text = _compact(default)
    return f"`{text}`" if len(text) <= _MAX_DEFAULT_LENGTH else "its defaults"


def _compact(value: Any) -> str:
    """Return a default as YAML in one line."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_compact(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_compact(one) for one in value) + "]"
    return value if isinstance(value, str) and value else json.dumps(value)


def _commands(path: str, command: Any) -> Iterator[tuple[str, Any]]:
    yield path, command
    for name, inner in sorted(getattr(command, "commands", {}).items()):
        yield from _commands(f"{path} {name}", inner)


def _command_section(path: str, command: Any) -> Iterator[str]:
    yield f"\n## {path} {{ #{_anchor(path)} }}\n"
    yield _prose(command.help or "")
    parameters = [one for one in command.params if "--help" not in one.opts]
    hints = typing.get_type_hints(command.callback) if command.callback else {}
    arguments = [one for one in parameters if one.param_type_name == "argument"]
    if getattr(command, "commands", None):
        usage = f"{path} COMMAND"
    else:
        usage = " ".join([path, *(_argument_name(one) for one in arguments), "[OPTIONS]"])
    yield f"\n```\n{usage}\n```\n"
    if parameters:
        yield "\n| | value | default | |\n|---|---|---|---|"
    for one in parameters:
        is_argument = one.param_type_name == "argument"
        names = [_argument_name(one)] if is_argument else [*one.opts, *one.secondary_opts]
        default = "required" if one.required else _default(one)
        value = f"`{one.metavar}`" if one.metavar else _value(hints.get(one.name, bool))
        cells = [" ".join(f"`{name}`" for name in names), value, default, _prose(one.help or "")]
        yield "| " + " | ".join(_cell(cell) for cell in cells) + " |"


def _argument_name(parameter: Any) -> str:
    name = parameter.metavar or parameter.name.upper()
    return f"{name}..." if parameter.nargs == -1 else name


def _value(kind: Any) -> str:
    """Return what an argument or option takes, from its annotation."""
    words = {str: "text", int: "whole number", float: "number", Path: "path", bool: "flag"}
    if kind in words:
        return words[kind]
    inner = [one for one in typing.get_args(kind) if one is not type(None)]
    if typing.get_origin(kind) is Literal:
        return ", ".join(f"`{one}`" for one in inner)
    return " or ".join(_value(one) for one in inner)


def _default(parameter: Any) -> str:
    if parameter.default is None or getattr(parameter, "is_flag", False):
        return ""
    return f"`{parameter.default}`"


def _anchor(text: str) -> str:
    return text.replace(", kind: ", "-kind-").replace(".", "-").replace(" ", "-")


def _prose(text: str) -> str:
    """Return the text of a docstring as Markdown, in which `<` outside of code begins no tag."""
    text = re.sub(r"`[^`]*`|<", lambda found: found[0] if found[0] != "<" else "&lt;", text)
    return "\n".join(line.strip() for line in text.strip().splitlines())


def _cell(text: str) -> str:
    return text.replace("\n", " ").replace("|", "\\|")
