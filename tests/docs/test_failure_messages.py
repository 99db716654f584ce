"""docs/faq.md: every message that it quotes is one that the code can say."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("flows", "tasks", "models", "storage")
HOLE = ".*?"
# Below this a pattern is nearly all holes, such as `{error}: {message}`, and matches anything.
MIN_CONSTANT_CHARACTERS = 30


def quoted_messages() -> list[str]:
    return re.findall(r"^```text\n(.+?)\n```$", (ROOT / "docs" / "faq.md").read_text(), re.M | re.S)


def pattern_of(node: ast.expr) -> str:
    """A regular expression for what a text expression can give."""
    match node:
        case ast.Constant(value=str(text)):
            return re.escape(text)
        case ast.JoinedStr(values=parts):
            return "".join(pattern_of(part) for part in parts)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return pattern_of(left) + pattern_of(right)
        case _:
            return HOLE


def whole_texts(node: ast.AST) -> Iterator[ast.expr]:
    """Every text expression that is not a part of another one."""
    if isinstance(node, ast.Constant | ast.JoinedStr) or (
        isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add)
    ):
        yield node
        return
    for child in ast.iter_child_nodes(node):
        yield from whole_texts(child)


def messages_of_the_code() -> list[re.Pattern[str]]:
    patterns: set[str] = set()
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            for text in whole_texts(ast.parse(path.read_text())):
                # Tables and logs follow in lines of their own.
                pattern = pattern_of(text).partition(re.escape("\n"))[0]
                if len(pattern.replace(HOLE, "")) >= MIN_CONSTANT_CHARACTERS:
                    patterns.add(pattern)
    return [re.compile(pattern, re.S) for pattern in sorted(patterns)]


@pytest.fixture(scope="module")
def patterns() -> list[re.Pattern[str]]:
    return messages_of_the_code()


@pytest.mark.parametrize("message", quoted_messages(), ids=lambda message: message[:40])
def test_the_code_says_what_the_page_quotes(patterns: list[re.Pattern[str]], message: str) -> None:
    assert any(one.fullmatch(message) for one in patterns)


def test_most_words_of_a_quoted_message_are_held_to_the_code(
    patterns: list[re.Pattern[str]],
) -> None:
    messages = quoted_messages()

    assert len(messages) >= 15
    for message in messages:
        words = message.split(" ")
        changed = [" ".join([*words[:i], "other", *words[i + 1 :]]) for i in range(len(words))]
        num_found = sum(not any(one.fullmatch(text) for one in patterns) for text in changed)
        assert num_found > len(words) / 3, message
