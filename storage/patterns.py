"""Shard patterns: what users write for a corpus, turned into the URLs of its shards.

Braces mean what they mean to webdataset (`{00000..00099}`, `{a,b}`); `*`, `?` and `[..]` match
within a folder and `**` across folders; a folder stands for all `.tar` below it; a `.txt` file
lists one entry a line. Entries may be joined by commas. `pipe:` commands and chained `::` URLs are
refused before anything is opened.
"""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath

from storage import objects

MAX_SHARDS = 1_000_000

_URL_RULE = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]*://")
_COMMAND_RULE = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]*:(?!//)")
_NUMBER_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.(-?\d+))?")
_LETTER_RANGE = re.compile(r"([A-Za-z])\.\.([A-Za-z])(?:\.\.(-?\d+))?")
_MAGIC = re.compile(r"[*?\[]")


def expand_shards(pattern: str | Sequence[str]) -> list[str]:
    """List the URLs of the shards that a pattern, or several, stand for.

    Local paths become absolute. Braces keep their order; folders and globs are sorted.

    Raises: ValueError if nothing matches, if an entry is a command, a chained URL or no `.tar`.
    """
    entries = [pattern] if isinstance(pattern, str) else list(pattern)
    urls = [url for entry in entries for part in _split(entry) for url in _expand(part)]
    if not urls:
        raise ValueError(
            f"no shard: the pattern {pattern!r} is empty. Give tar files, a brace pattern such as "
            "s3://bucket/train-{00000..00099}.tar, a folder or a list file"
        )
    return urls


def below_root(pattern: str, root: str) -> str:
    """Put a folder or URL before every relative entry of a pattern; an empty root changes nothing.

    Entries that are URLs or begin with / or ~ stay as they are.
    """
    if not root:
        return pattern
    return ",".join(
        entry
        if _URL_RULE.match(entry) or entry.startswith(("/", "~"))
        else objects.join_url(root, entry)
        for entry in _split(pattern)
    )


def expand_braces(pattern: str) -> Iterator[str]:
    """Yield what a shell, and webdataset, makes of braces; without any, the pattern itself.

    Raises: ValueError if a brace is not closed.
    """
    start = pattern.find("{")
    if start < 0:
        if "}" in pattern:
            raise ValueError(f"the pattern {pattern!r} closes a brace that it does not open")
        yield pattern
        return
    end = _closing(pattern, start)
    inner = pattern[start + 1 : end]
    for choice in _choices(inner):
        for rest in expand_braces(pattern[end + 1 :]):
            yield pattern[:start] + choice + rest


def _closing(pattern: str, start: int) -> int:
    depth = 0
    for position in range(start, len(pattern)):
        depth += {"{": 1, "}": -1}.get(pattern[position], 0)
        if depth == 0:
            return position
    raise ValueError(f"the pattern {pattern!r} opens a brace that it does not close")


def _choices(inner: str) -> Iterator[str]:
    numbers, letters = _NUMBER_RANGE.fullmatch(inner), _LETTER_RANGE.fullmatch(inner)
    if numbers is not None:
        first, last, step = numbers.groups()
        # As in a shell: a leading zero on either side pads all to the longer one.
        padded = any(re.match(r"-?0\d", end) for end in (first, last))
        width = max(len(first), len(last)) if padded else 0
        for number in _span(int(first), int(last), int(step or 1)):
            yield f"{number:0{width}d}"
    elif letters is not None:
        first, last, step = letters.groups()
        for code in _span(ord(first), ord(last), int(step or 1)):
            yield chr(code)
    else:
        parts = _split(inner, keep_empty=True)
        if len(parts) == 1:  # a single choice is no choice: the braces are part of the name
            for text in expand_braces(inner):
                yield "{" + text + "}"
        else:
            for part in parts:
                yield from expand_braces(part)


def _span(first: int, last: int, step: int) -> range:
    size = max(1, abs(step))
    numbers = range(first, last + 1, size) if first <= last else range(first, last - 1, -size)
    if len(numbers) > MAX_SHARDS:
        raise ValueError(f"{first}..{last} stands for more than {MAX_SHARDS} shards")
    return numbers


def _split(text: str, *, keep_empty: bool = False) -> list[str]:
    """Split at the commas that lie outside braces."""
    parts, depth, begin = list[str](), 0, 0
    for position, character in enumerate(text):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if character == "," and depth == 0:
            parts.append(text[begin:position])
            begin = position + 1
    parts.append(text[begin:])
    return parts if keep_empty else [part.strip() for part in parts if part.strip()]


def _refuse_commands(entry: str) -> None:
    if _COMMAND_RULE.match(entry) or "::" in entry or entry.startswith("-"):
        raise ValueError(
            f"the shard entry {entry!r} is refused: commands (pipe:) and chained URLs (::) are "
            "never run. Give a path or a plain URL such as s3://bucket/train-00000.tar"
        )


def _expand(entry: str, *, folder: str = "", in_list: str | None = None) -> Iterator[str]:
    _refuse_commands(entry)
    for text in expand_braces(entry):
        _refuse_commands(text)
        url = _absolute(text, folder)
        suffix = PurePosixPath(url).suffix.lower()
        if _MAGIC.search(url):
            yield from _matching(url)
        elif suffix == ".tar":
            yield url
        elif suffix == ".txt" and in_list is None:
            yield from _listed(url)
        elif _is_folder(url, suffix):
            yield from _tars_below(url)
        else:
            where = f" (in the list {in_list})" if in_list else ""
            raise ValueError(
                f"{url!r}{where} is neither a .tar file, a folder nor, given directly, a .txt list "
                "of shards; compressed tars are not read: decompress them"
            )


def _absolute(text: str, folder: str) -> str:
    if _URL_RULE.match(text):
        return text
    if _URL_RULE.match(folder):
        return objects.join_url(folder, text)
    return os.path.abspath(os.path.join(folder, os.path.expanduser(text)))


def _is_folder(url: str, suffix: str) -> bool:
    if not _URL_RULE.match(url):
        return os.path.isdir(url)
    return url.endswith("/") or suffix not in {".gz", ".tgz", ".zip", ".zst", ".json", ".txt"}


def _listed(url: str) -> Iterator[str]:
    folder = url.rpartition("/")[0]
    try:
        lines = objects.read_object(url).decode("utf-8").splitlines()
    except FileNotFoundError as error:
        raise ValueError(f"the list of shards {url!r} does not exist") from error
    entries = [line.strip() for line in lines]
    for entry in entries:
        if entry and not entry.startswith("#"):
            yield from _expand(entry, folder=folder, in_list=url)


def _tars_below(url: str) -> list[str]:
    found = sorted(u for u in _objects_below(url) if u.lower().endswith(".tar"))
    if not found:
        raise ValueError(f"no shard: the folder {url!r} holds no .tar file")
    return found


def _objects_below(folder: str) -> list[str]:
    return [objects.join_url(folder, name) for name in objects.list_objects(folder)]


def _matching(url: str) -> list[str]:
    folder = _MAGIC.split(url, maxsplit=1)[0].rpartition("/")[0]
    rule = re.compile(_glob_rule(url))
    found = sorted(u for u in _objects_below(folder) if rule.fullmatch(u))
    if not found:
        raise ValueError(f"no shard: nothing matches {url!r}")
    return found


def _glob_rule(pattern: str) -> str:
    """Turn a glob into a regular expression; `*` and `?` stay within a folder, `**` does not."""
    rule, rest = "", pattern
    while rest:
        if rest.startswith("**/"):
            rule, rest = rule + "(?:.*/)?", rest[3:]
        elif rest.startswith("**"):
            rule, rest = rule + ".*", rest[2:]
        elif rest[0] in "*?":
            rule, rest = rule + ("[^/]*" if rest[0] == "*" else "[^/]"), rest[1:]
        elif (match := re.match(r"\[(!?)([^\]]+)\]", rest)) is not None:
            members = match.group(2).replace("\\", "\\\\").replace("^", "\\^")
            rule, rest = rule + f"[{'^' if match.group(1) else ''}{members}]", rest[match.end() :]
        else:
            rule, rest = rule + re.escape(rest[0]), rest[1:]
    return rule
