"""The site of docs/: it builds without a warning, and its generated pages leave nothing out."""

import re
import subprocess
import sys
import typing
from collections.abc import Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel
from typer.main import get_command
from typer.testing import CliRunner

from flows.cli import app
from flows.config import SelfTrainingConfig
from flows.loading import parse_config, recipe_names

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
# Where the repository's rendering and the site's differ, the pages use neither.
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
GENERATED = {"recipes.md", "reference/config.md", "reference/cli.md"}


def load_hook() -> Any:
    spec = spec_from_file_location("site_reference", DOCS / "_hooks" / "reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


REFERENCE = load_hook()


def sections(page: str) -> dict[str, str]:
    """The text below each heading of the second level, by the heading."""
    parts = re.split(r"^## (.+?) \{ #\S+ \}$", page, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def models_of(kind: Any, seen: dict[type[BaseModel], None]) -> None:
    """Collect the models that a type may hold, members of unions included."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        if kind in seen:
            return
        seen[kind] = None
        for field in kind.model_fields.values():
            models_of(field.annotation, seen)
    for part in typing.get_args(kind):
        models_of(part, seen)


@pytest.mark.parametrize("page", ["config_reference", "cli_reference", "recipes"])
def test_generated_pages_have_nothing_outside_code_that_a_browser_takes_for_a_tag(
    page: str,
) -> None:
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", getattr(REFERENCE, page)(), flags=re.S)
    assert re.findall(r"</?[A-Za-z][^>\n]*>", prose) == []


def test_every_key_of_every_model_is_in_the_config_reference() -> None:
    found = sections(REFERENCE.config_reference())
    known: dict[type[BaseModel], None] = {}
    models_of(SelfTrainingConfig, known)

    assert len(known) > 100
    assert len(found) == len(known)
    rows = [set(re.findall(r"^\| `(\w+)` \|", text, re.M)) for text in found.values()]
    for model in known:
        keys = {field.alias or name for name, field in model.model_fields.items()}
        assert keys in rows, f"no section with the keys {sorted(keys)} of {model.__name__}"


def test_keys_are_shown_with_bounds_defaults_and_meaning() -> None:
    found = sections(REFERENCE.config_reference())

    assert (
        "| `rounds` | whole number (>= 0, <= 50) | `3` |"
        " Students trained after the teacher; 0: the teacher alone, on labels. |"
    ) in found["the run"]
    assert "| `name` | text (matching" in found["the run"]
    assert "| required | The run's name in the store; a run keeps its config" in found["the run"]
    assert "[small_cnn](#teacher-architecture-kind-small_cnn)" in found["teacher, kind: train"]
    assert re.search(r"^Also .*`student\.noise`", found["teacher.noise"], re.M)
    fixed = found["selection.threshold, kind: fixed"]
    assert "| `confidence` | number (>= 0, <= 1) | `0.3` | Lowest confidence that is kept" in fixed


def commands(path: tuple[str, ...], command: Any) -> Iterator[tuple[str, ...]]:
    yield path
    for name, inner in getattr(command, "commands", {}).items():
        yield from commands((*path, name), inner)


def test_every_option_that_help_shows_is_in_the_reference_of_the_command_line() -> None:
    found = sections(REFERENCE.cli_reference())
    paths = list(commands((), get_command(app)))

    assert {" ".join(("selftrain", *path)) for path in paths} == found.keys()
    num_options = 0
    for path in paths:
        shown = CliRunner().invoke(app, [*path, "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"})
        assert shown.exit_code == 0
        # Not those that the summary of another command mentions.
        own = shown.output.partition(" Commands ")[0]
        options = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", own)) - {"--help"}
        text = found[" ".join(("selftrain", *path))]
        for option in options:
            assert option in text, f"{option} of selftrain {' '.join(path)}"
        num_options += len(options)
    assert num_options > 60


def test_every_recipe_is_on_the_page_of_recipes() -> None:
    page = REFERENCE.recipes()

    assert re.findall(r"^## (\w+)$", page, re.M) == list(recipe_names())
    for body in re.findall(r"^```yaml\n(.*?)^```$", page, re.M | re.S):
        assert isinstance(parse_config(yaml.safe_load(body), where="recipe"), SelfTrainingConfig)


def test_configs_that_the_pages_show_are_valid() -> None:
    shown = [
        block
        for page in DOCS.glob("*.md")
        for block in re.findall(r"^```yaml\n(.*?)^```$", page.read_text(), re.M | re.S)
        if block.startswith("schema:")
    ]

    assert shown
    for block in shown:
        assert parse_config(yaml.safe_load(block), where="docs").name == "mine"


def pages() -> list[Path]:
    return [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))]


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere_in_the_repository(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    for target in LINK.findall(text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        place = (page.parent / path).resolve() if path else page
        if place.is_relative_to(DOCS) and place.relative_to(DOCS).as_posix() in GENERATED:
            continue  # in the site alone, whose build checks it
        assert place.exists(), f"{target} in {page.name}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", place.read_text(), re.M)
            assert anchor in {slug(heading) for heading in headings}, f"{target} in {page.name}"


def slug(heading: str) -> str:
    """The anchor that the repository's rendering gives a heading."""
    heading = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def build(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


def test_site_builds_without_a_warning_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    done = build(tmp_path)

    assert done.returncode == 0, done.stderr
    assert not re.search(r"^(WARNING|ERROR)", done.stderr, re.M)
    built = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.html")}
    assert {"index.html", "faq.html", "reference/config.html", "extending/noise.html"} <= built
    assert not [name for name in built if "_hooks" in name]
    assert len(built) > 25
    # Messages are of one long line, whose end is the remedy: it must not be out of sight.
    failures = (tmp_path / "faq.html").read_text()
    messages = re.findall(r"^```text$", (DOCS / "faq.md").read_text(), re.M)
    assert failures.count('<div class="language-text highlight">') == len(messages)
    assert 'href="stylesheets/text-blocks.css"' in failures
    for name in built:
        html = (tmp_path / name).read_text()
        loaded = re.findall(
            r'<(?:script|img|link rel="stylesheet")[^>]*(?:src|href)="(http[^"]+)"', html
        )
        assert loaded == [], name
