"""Samples of a WebDataset shard: a strict tar reader that skips nothing in silence.

`webdataset` is the oracle of the tests; its own reader swallows cut shards and skips links and
broken headers, so the stages read through this one.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
"""Looked at in this order: of a sample with several images the first kind listed is the image."""

MAX_MEMBER_BYTES = 64 * 2**20
MAX_HEADER_BYTES = 64 * 2**10
MAX_LABEL = 2**31 - 1

_BLOCK = 512
_ZERO_BLOCK = bytes(_BLOCK)
# webdataset's rules: the key ends at the first dot of the base name; `__...__` names are metadata.
_KEY_RULE = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")
_METADATA_RULE = re.compile(r"__[^/]*__($|/)")
_CONTROL_CHARACTERS = re.compile(r"[\x00-\x1f\x7f]")
_LABEL_RULE = re.compile(rb"\s*([0-9]{1,10})\s*")
# First bytes of gzip, bzip2, xz and zstd.
_COMPRESSED = (b"\x1f\x8b\x08", b"BZh", b"\xfd7z", b"\x28\xb5\x2f")
_KINDS = {
    b"1": "hard link",
    b"2": "symbolic link",
    b"3": "character device",
    b"4": "block device",
    b"6": "fifo",
    b"S": "sparse file",
}


class CorruptShard(ValueError):
    """A shard whose bytes are not what a shard, or this very shard, must be."""


@dataclass(frozen=True, slots=True)
class RawSample:
    """One undecoded sample.

    Attributes:
        key: `<shard stem>/<webdataset key>`, what every join is on.
        image: the image file's bytes, a view into the shard.
        image_extension: lower case, one of `IMAGE_EXTENSIONS`.
        label: content of the `.cls` member; None without one.
        offset: position of the image's first byte in the shard.
    """

    key: str
    image: memoryview
    image_extension: str
    label: int | None
    offset: int


@dataclass(frozen=True, slots=True)
class _Member:
    name: str
    offset: int
    size: int


def sample_key(stem: str, in_shard_key: str) -> str:
    """Join the shard's stem and the webdataset key into the key of the whole corpus."""
    return f"{stem}/{in_shard_key}"


def in_shard_key(key: str, stem: str) -> str:
    """Take the shard's stem off a sample key.

    Raises: ValueError if the key belongs to another shard.
    """
    if not key.startswith(f"{stem}/"):
        raise ValueError(f"sample key {key!r} does not belong to shard {stem!r}")
    return key[len(stem) + 1 :]


def iterate_samples(
    data: bytes | memoryview, *, stem: str, num_samples: int | None = None
) -> list[RawSample]:
    """List the samples of a shard in its own order, checked as a whole before any is returned.

    Members other than `.jpg .jpeg .png .webp .cls` are checked and passed over. Directories are
    passed over; links, devices and sparse files are refused.

    Args:
        data: the whole tar file, uncompressed.
        stem: the shard's stem, first part of every key.
        num_samples: what the corpus says; None when the shard is read for the first time.
    Raises: CorruptShard, naming the shard, for a cut or damaged tar, a repeated key, a sample
        without image, a bad `.cls` or a count other than `num_samples`.
    """
    view = memoryview(data)
    if bytes(view[:3]) in _COMPRESSED:
        raise CorruptShard(f"shard {stem}: compressed; shards are read as plain tar: decompress it")
    samples: list[RawSample] = []
    seen: set[str] = set()
    imageless: list[str] = []
    for key, members in _groups(view, stem):
        if key in seen:
            raise CorruptShard(
                f"shard {stem}: key {key!r} occurs twice; members of one sample must lie side by "
                "side and keys must be unique in a shard. Write the shard again with unique keys"
            )
        seen.add(key)
        extension = next((e for e in IMAGE_EXTENSIONS if e in members), None)
        if extension is None:
            imageless.append(key)
            continue
        image = members[extension]
        label = members.get("cls")
        samples.append(
            RawSample(
                key=sample_key(stem, key),
                image=view[image.offset : image.offset + image.size],
                image_extension=extension,
                label=None if label is None else _label(view, label, stem),
                offset=image.offset,
            )
        )
    if imageless:
        raise CorruptShard(
            f"shard {stem}: {len(imageless)} of {len(seen)} samples have no member of "
            f"{', '.join(IMAGE_EXTENSIONS)}; first key {imageless[0]!r}"
        )
    if num_samples is not None and len(samples) != num_samples:
        raise CorruptShard(
            f"shard {stem}: {len(samples)} samples, but the corpus was indexed with {num_samples}; "
            "the shard changed since: index the corpus again"
        )
    return samples


def _groups(view: memoryview, stem: str) -> Iterator[tuple[str, dict[str, _Member]]]:
    """Yield (webdataset key, extension -> member) of members that lie side by side."""
    current: str | None = None
    members: dict[str, _Member] = {}
    for member in _members(view, stem):
        match = _KEY_RULE.match(member.name)
        if match is None or _METADATA_RULE.match(member.name):
            continue
        key, extension = match.group(1), match.group(2).lower()
        if key != current:
            if current is not None:
                yield current, members
            current, members = key, {}
        if extension in members:
            raise CorruptShard(
                f"shard {stem}: key {key!r} has two members with extension {extension!r}"
            )
        members[extension] = member
    if current is not None:
        yield current, members


def _members(view: memoryview, stem: str) -> Iterator[_Member]:
    """Yield regular files up to the end-of-archive block, which must be there."""
    position = 0
    long_name: str | None = None
    while True:
        header = bytes(view[position : position + _BLOCK])
        if len(header) < _BLOCK:
            raise CorruptShard(
                f"shard {stem}: cut at byte {len(view)}: no end-of-archive block. Copy the shard "
                "again from where it was whole"
            )
        if header == _ZERO_BLOCK:
            _check_tail(view, position, stem)
            return
        _check_header(header, position, stem)
        kind = header[156:157]
        size = _octal(header[124:136], stem, position)
        content = position + _BLOCK
        position = content + -(-size // _BLOCK) * _BLOCK
        if position > len(view):
            raise CorruptShard(
                f"shard {stem}: cut at byte {len(view)}: a member of {size} bytes begins at "
                f"{content}. Copy the shard again from where it was whole"
            )
        if kind in (b"x", b"g", b"L"):
            name = _extended_name(kind, bytes(view[content : content + size]), stem)
            long_name = name if name is not None else long_name
            continue
        name = long_name if long_name is not None else _short_name(header, stem)
        long_name = None
        if kind == b"5" or (kind == b"\0" and name.endswith("/")):
            continue
        if kind not in (b"0", b"\0", b"7"):
            raise CorruptShard(
                f"shard {stem}: member {name!r} is a {_KINDS.get(kind, f'member of type {kind!r}')}"
                "; a shard may hold regular files only"
            )
        if size > MAX_MEMBER_BYTES:
            raise CorruptShard(
                f"shard {stem}: member {name!r} has {size} bytes; the limit is {MAX_MEMBER_BYTES}"
            )
        _check_name(name, stem)
        yield _Member(name, content, size)


def _check_tail(view: memoryview, position: int, stem: str) -> None:
    tail = view[position:]
    if tail != memoryview(bytes(len(tail))):
        raise CorruptShard(
            f"shard {stem}: the end-of-archive block at byte {position} is followed by data "
            "(a zeroed header, or two tars run together)"
        )


def _check_header(header: bytes, position: int, stem: str) -> None:
    stored = _octal(header[148:156], stem, position)
    # The checksum counts its own field as eight spaces.
    if stored != sum(header) - sum(header[148:156]) + 8 * 32:
        raise CorruptShard(f"shard {stem}: damaged tar header at byte {position} (bad checksum)")


def _octal(field: bytes, stem: str, position: int) -> int:
    text = field.strip(b" \0")
    if field[0] & 0x80 or not re.fullmatch(rb"[0-7]*", text):
        raise CorruptShard(
            f"shard {stem}: the tar header at byte {position} has no octal number in {field!r}"
        )
    return int(text or b"0", 8)


def _short_name(header: bytes, stem: str) -> str:
    name = header[:100].split(b"\0", 1)[0]
    # GNU headers ("ustar  ") keep times where POSIX ones ("ustar\0") have the folder.
    prefix = header[345:500].split(b"\0", 1)[0] if header[257:263] == b"ustar\0" else b""
    return _decode_name(prefix + b"/" + name if prefix else name, stem)


def _extended_name(kind: bytes, content: bytes, stem: str) -> str | None:
    """Read the name out of a GNU long-name or PAX header; None if it sets none."""
    if len(content) > MAX_HEADER_BYTES:
        raise CorruptShard(
            f"shard {stem}: a tar header of {len(content)} bytes; the limit is {MAX_HEADER_BYTES}"
        )
    if kind == b"L":
        return _decode_name(content.split(b"\0", 1)[0], stem)
    name: str | None = None
    rest = content.rstrip(b"\0")
    while rest:
        match = re.match(rb"([0-9]{1,6}) ", rest)
        length = int(match.group(1)) if match else 0
        keyword, separator, value = rest[match.end() if match else 0 : length - 1].partition(b"=")
        if not separator or length > len(rest):
            raise CorruptShard(f"shard {stem}: damaged PAX header {rest[:40]!r}")
        if keyword == b"path" and kind == b"x":
            name = _decode_name(value, stem)
        elif keyword in (b"path", b"size") or keyword.startswith(b"GNU.sparse"):
            raise CorruptShard(
                f"shard {stem}: a PAX header sets {keyword.decode(errors='replace')!r}; sparse and "
                "oversized members are refused. Write the shard again with webdataset's writer"
            )
        rest = rest[length:]
    return name


def _decode_name(name: bytes, stem: str) -> str:
    try:
        return name.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CorruptShard(f"shard {stem}: the member name {name!r} is not UTF-8") from error


def _check_name(name: str, stem: str) -> None:
    if name.startswith("/") or ".." in name.split("/") or _CONTROL_CHARACTERS.search(name):
        raise CorruptShard(
            f"shard {stem}: member name {name!r} is absolute, leaves its folder or has control "
            "characters"
        )


def _label(view: memoryview, member: _Member, stem: str) -> int:
    content = bytes(view[member.offset : member.offset + min(member.size, 64)])
    match = _LABEL_RULE.fullmatch(content) if member.size <= 64 else None
    if match is None or int(match.group(1)) > MAX_LABEL:
        raise CorruptShard(
            f"shard {stem}: {member.name!r} holds {content!r}; a .cls member must hold one class "
            f"number from 0 to {MAX_LABEL} in decimal"
        )
    return int(match.group(1))
