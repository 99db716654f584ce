"""Images that are not yet in shards: folders, archives and tables, listed with lazy loaders."""

import csv
import io
import os
import tarfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow.parquet as pq

from storage import objects

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm", ".tif", ".tiff"})
SPLIT_NAMES = frozenset({"train", "test", "val", "valid", "validation", "dev", "unlabeled"})
ARCHIVE_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
MAX_ARCHIVE_BYTES = 8 * 2**30


@dataclass(frozen=True, slots=True)
class SourceImage:
    """One image file, not yet read.

    Attributes:
        path: relative to the source, with slashes; unique in it, and what seeded draws hash.
        label: name of the class; None where unknown.
        load: reads the file's bytes.
    """

    path: str
    label: str | None
    load: Callable[[], bytes] = field(compare=False, repr=False)


def read_source(source: str, *, split: str | None = None) -> list[SourceImage]:
    """List the images of `cifar10`, a folder, a `.csv` or `.parquet` table, or a tar archive.

    Args:
        source: `cifar10`, `cifar10:FOLDER` (where torchvision downloads it to), or a path.
        split: `train` or `test`, say, where the source has splits; None where it has none.
    Raises: ValueError if nothing is there, the kind is unknown, or the split is needed, unknown or
        not applicable.
    """
    name, _, folder = source.partition(":")
    lower = source.lower()
    if name == "cifar10":
        return read_cifar10(folder or "selftrain-data", split=split or "train")
    if lower.endswith((".csv", ".parquet")):
        if split is not None:
            raise ValueError(f"{source}: a table has no splits, so split={split!r} cannot be met")
        return read_table(source)
    if lower.endswith(ARCHIVE_SUFFIXES):
        return read_archive(source, split=split)
    if os.path.isdir(source):
        return read_image_folder(source, split=split)
    raise ValueError(
        f"{source!r} is neither cifar10, an existing folder, a .csv or .parquet table nor an "
        f"archive ({', '.join(ARCHIVE_SUFFIXES)})"
    )


def read_image_folder(folder: str | Path, *, split: str | None = None) -> list[SourceImage]:
    """List `CLASS/.../image` or, with a split, `SPLIT/CLASS/.../image`, sorted by path.

    Images that lie directly in the folder have no label. Hidden files are passed over.
    """
    root = Path(folder)
    found: dict[str, Callable[[], bytes]] = {}
    for parent, folders, names in os.walk(root):
        folders.sort()
        for name in names:
            path = Path(parent) / name
            found[path.relative_to(root).as_posix()] = path.read_bytes
    return _images(found, split, str(folder))


def read_archive(archive: str | Path, *, split: str | None = None) -> list[SourceImage]:
    """List the images of a tar archive that is laid out like an image folder.

    An uncompressed archive is read image by image; a compressed one is held in memory as a whole,
    up to 8 GiB of images.
    """
    path = Path(archive)
    if not path.is_file():
        raise ValueError(f"{archive}: no such archive")
    compressed = not path.name.lower().endswith(".tar")
    found: dict[str, Callable[[], bytes]] = {}
    num_bytes = 0
    try:
        with tarfile.open(path, "r|*" if compressed else "r:") as tar:
            for member in tar:
                if not member.isfile() or not _is_image(name := _clean_name(member.name, archive)):
                    continue
                if split is not None and _parts(name)[0] != split:
                    found[name] = partial(_never_loaded, name)
                elif compressed:
                    num_bytes += member.size
                    if num_bytes > MAX_ARCHIVE_BYTES:
                        raise ValueError(
                            f"{archive}: more than {MAX_ARCHIVE_BYTES} bytes of images in a "
                            "compressed archive; unpack it and give the folder"
                        )
                    found[name] = partial(_identity, tar.extractfile(member).read())  # type: ignore
                else:
                    found[name] = partial(_read_range, path, member.offset_data, member.size)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ValueError(f"{archive}: not a whole tar archive: {error}") from error
    return _images(found, split, str(archive))


def _clean_name(name: str, archive: str | Path) -> str:
    if name.startswith("/") or ".." in name.split("/"):
        raise ValueError(f"{archive}: member {name!r} is absolute or leaves the archive")
    return name.removeprefix("./")


def _identity(data: bytes) -> bytes:
    return data


def _never_loaded(name: str) -> bytes:
    raise AssertionError(f"{name} belongs to another split")


def _read_range(path: Path, offset: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(size)


def _parts(path: str) -> tuple[str, ...]:
    return PurePosixPath(path).parts


def _is_image(path: str) -> bool:
    pure = PurePosixPath(path)
    hidden = any(part.startswith((".", "__MACOSX")) for part in pure.parts)
    return pure.suffix.lower() in EXTENSIONS and not hidden


def _images(
    found: Mapping[str, Callable[[], bytes]], split: str | None, where: str
) -> list[SourceImage]:
    """Give each path its label, in order of paths, after choosing the split."""
    paths = sorted(path for path in found if _is_image(path))
    tops = {_parts(path)[0] for path in paths if len(_parts(path)) > 1}
    splits = sorted(tops) if tops and tops <= SPLIT_NAMES else []
    if splits and split is None:
        raise ValueError(f"{where} has the splits {', '.join(splits)}: choose one with split=NAME")
    if split is not None:
        if split not in splits:
            raise ValueError(
                f"{where} has no split {split!r}; "
                + (f"it has {', '.join(splits)}" if splits else "it has no splits")
            )
        paths = [path for path in paths if _parts(path)[0] == split]
    if not paths:
        raise ValueError(
            f"{where}: no image with one of {', '.join(sorted(EXTENSIONS))}. Put labelled images"
            " into one folder for each class, unlabelled ones directly into it"
        )
    depth = 0 if split is None else 1
    return [
        SourceImage(
            path, _parts(path)[depth] if len(_parts(path)) > depth + 1 else None, found[path]
        )
        for path in paths
    ]


def read_table(table: str | Path) -> list[SourceImage]:
    """List the rows of a CSV (with header) or Parquet table with columns `path` and `label`.

    Relative paths resolve against the table's folder; URLs of any fsspec kind are read too. Without
    a `label` column, or where it is empty, the label is unknown.
    """
    where = str(table)
    folder = where.rpartition("/")[0] if "://" in where else os.path.dirname(os.path.abspath(where))
    try:
        data = objects.read_object(where)
    except FileNotFoundError as error:
        raise ValueError(f"{where}: no such table") from error
    rows, columns = _rows(data, where)
    if "path" not in columns:
        raise ValueError(
            f"{where}: no column 'path'; it has {', '.join(columns) or 'none'}. The columns must be"
            " called path and label"
        )
    images: list[SourceImage] = []
    seen: set[str] = set()
    for number, row in enumerate(rows, start=1):
        path, label = str(row.get("path") or ""), row.get("label")
        if not path or path in seen:
            raise ValueError(f"{where}, row {number}: path {path!r} is empty or came before")
        seen.add(path)
        name = None if label is None or str(label) == "" else str(label)
        images.append(SourceImage(path, name, partial(_load, _resolved(path, folder), where)))
    if not images:
        raise ValueError(f"{where}: the table has no row")
    return images


def _rows(data: bytes, where: str) -> tuple[Iterable[Mapping[str, Any]], Sequence[str]]:
    if where.lower().endswith(".parquet"):
        try:
            content = pq.read_table(io.BytesIO(data))
        except (OSError, ValueError) as error:
            raise ValueError(f"{where}: not a Parquet file: {error}") from error
        return content.to_pylist(), content.column_names
    try:
        reader = csv.DictReader(io.StringIO(data.decode("utf-8-sig"), newline=""))
        return list(reader), list(reader.fieldnames or [])
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{where}: not a CSV table in UTF-8: {error}") from error


def _resolved(path: str, folder: str) -> str:
    if "://" in path:
        return path
    return objects.join_url(folder, path) if "://" in folder else os.path.join(folder, path)


def _load(url: str, table: str) -> bytes:
    try:
        return objects.read_object(url)
    except FileNotFoundError as error:
        raise ValueError(f"{table} names {url}, which does not exist") from error


def read_cifar10(folder: str | Path, *, split: str) -> list[SourceImage]:
    """List CIFAR-10's `train` or `test` split as PNGs, downloading it into the folder if needed."""
    from torchvision.datasets import CIFAR10

    if split not in {"train", "test"}:
        raise ValueError(f"cifar10 has no split {split!r}; it has train, test")
    dataset = CIFAR10(str(folder), train=split == "train", download=True)
    names = dataset.classes
    return [
        SourceImage(
            f"{split}/{names[label]}/{i:05d}.png", names[label], partial(_png, dataset.data[i])
        )
        for i, label in enumerate(dataset.targets)
    ]


def _png(pixels: Any) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()
