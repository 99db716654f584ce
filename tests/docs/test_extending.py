"""docs/extending: what the pages tell a contributor to do is done here, in a copy of the code."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted(path for path in (ROOT / "docs" / "extending").glob("*.md") if path.stem != "index")
COPIED = ("flows", "tasks", "models", "storage", "docs", "tests", "pyproject.toml", "README.md")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, the file that it is about, and its lines."""

    language: str
    title: str | None
    lines: list[str]


def blocks_of(page: Path) -> list[Block]:
    found = re.findall(
        r'^```(\w+)(?: title="([^"\n]+)")?\n(.*?)^```$', page.read_text(), re.M | re.S
    )
    return [Block(language, title or None, body.splitlines()) for language, title, body in found]


def edited(text: str, hunk: list[str]) -> str:
    """Apply one hunk: its context and removed lines stand in the text exactly once, in a row.

    A context line that ends in ` ...` stands for any line that begins so.
    """
    lines = text.split("\n")
    old = [line for line in hunk if not line.startswith("+")]
    starts = [
        start
        for start in range(len(lines) - len(old) + 1)
        if all(_is_like(lines[start + i], one[1:]) for i, one in enumerate(old))
    ]
    assert len(starts) == 1, f"{len(starts)} places for\n" + "\n".join(hunk)
    there = iter(lines[starts[0] : starts[0] + len(old)])
    new: list[str] = []
    for line in hunk:
        if line.startswith("+"):
            new.append(line[1:])
            continue
        kept = next(there)
        if not line.startswith("-"):
            new.append(kept)
    return "\n".join([*lines[: starts[0]], *new, *lines[starts[0] + len(old) :]])


def _is_like(line: str, wanted: str) -> bool:
    start, _, _ = wanted.rpartition(" ...")
    return line.startswith(start) if wanted.endswith(" ...") else line == wanted


def follow(page: Path, copy: Path) -> list[str]:
    """Write the page's new files and edit the others; return its commands."""
    commands: list[str] = []
    for block in blocks_of(page):
        match block.language:
            case "python":
                assert block.title is not None
                path = copy / block.title
                assert not path.exists(), f"{block.title} is there already"
                path.write_text("\n".join([*block.lines, ""]))
            case "diff":
                assert block.title is not None
                path = copy / block.title
                text = path.read_text()
                for hunk in "\n".join(block.lines).split("\n@@\n"):
                    # Markdown editors strip the space of an empty context line.
                    text = edited(text, [line or " " for line in hunk.split("\n")])
                path.write_text(text)
            case "bash":
                commands += block.lines
            case other:
                raise AssertionError(f"{page.name}: a block of {other}, which nothing runs")
    return commands


def copy_of_the_code(folder: Path) -> Path:
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
            shutil.copytree(source, folder / name, ignore=ignored)
        else:
            shutil.copy(source, folder / name)
    return folder


def run(copy: Path, command: str) -> str:
    """Run a command with the copy's packages and this environment's programs."""
    done = subprocess.run(
        ["bash", "-euc", command],
        cwd=copy,
        env={
            **os.environ,
            "PYTHONPATH": str(copy),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PATH": f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}",
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_page_can_be_followed_on_its_own(page: Path, tmp_path: Path) -> None:
    copy = copy_of_the_code(tmp_path / "copy")

    commands = follow(page, copy)

    (of_tests, of_use) = commands
    assert of_tests.startswith("pytest -q tests/models/")
    assert (copy / of_tests.split()[-1]).is_file()
    assert of_use.startswith("selftrain config ")


@pytest.mark.slow
def test_tests_and_commands_of_all_pages_succeed_together(tmp_path: Path) -> None:
    copy = copy_of_the_code(tmp_path / "copy")
    commands = [command for page in PAGES for command in follow(page, copy)]

    tests = [one.split()[-1] for one in commands if one.startswith("pytest ")]
    said = run(copy, f"{sys.executable} -m pytest -q -p no:cacheprovider {' '.join(tests)}")

    assert len(tests) == 4
    assert re.search(r"^\d+ passed", said, re.M)
    # Each config is printed in full: what was added is in it.
    for command in [one for one in commands if one.startswith("selftrain ")]:
        (key,) = re.findall(r"kind: (\w+)|(grayscale)=", command)
        assert "".join(key) in run(copy, command)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_what_the_pages_add_passes_the_gate(tmp_path: Path) -> None:
    copy = copy_of_the_code(tmp_path / "copy")
    for page in PAGES:
        follow(page, copy)
    added = [block.title for page in PAGES for block in blocks_of(page) if block.title]
    code = " ".join(sorted({title for title in added if title.endswith(".py")}))

    run(copy, f"ruff check {code} && ruff format --check {code}")
    run(copy, f"pyright --pythonpath {sys.executable} models")
    # The docs name every setting, and no fingerprint of a recipe has changed.
    documented = "tests/flows/test_loading.py::test_every_setting_is_named_in_the_documentation"
    pytest_here = f"{sys.executable} -m pytest -q -p no:cacheprovider"
    run(copy, f"{pytest_here} {documented} tests/flows/test_fingerprints.py")
    changed = subprocess.run(
        ["diff", ROOT / "tests/golden/fingerprints.json", copy / "tests/golden/fingerprints.json"],
        check=False,
    )
    assert changed.returncode == 0
