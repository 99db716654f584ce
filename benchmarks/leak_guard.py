"""Does the leak guard find planted copies, and how many other images does it take for copies?

Copies of CIFAR-10 test images (32 pixels) and of photographs (ImageNet, about 500 pixels) are made
here: re-encoded, resized, cut at the borders, mirrored. Images that are no planted copies are those
of CIFAR-10's training split against its test split, save for the pairs that show the same
photograph (`references/cifar10_copies.txt`, told apart by eye), and one half of the photographs
against the other. With `--sheet FILE.png` all hits of the training split are drawn side by side.
"""

import io
import tarfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from benchmarks.figures import Figure, benchmark_parser, figure, print_figures
from models.leak_guard_config import NearDuplicatesConfig
from models.near_duplicates import Matches, References, describe, find_near_duplicates
from tasks.guarding import thumbnail

_DATA = Path(__file__).parents[2] / "shared" / "data"
_THRESHOLD = NearDuplicatesConfig().threshold
_SEED = 0
_ARCHIVES = ("cifar10-jpeg.tar.gz", "imagenet-sample-400.tar")
_COPIES_IN_CIFAR10 = Path(__file__).parent / "references" / "cifar10_copies.txt"

Files = list[tuple[str, bytes]]
"""Name and contents of image files."""


def main() -> None:
    parser = benchmark_parser(__doc__, quick="a tenth of the images")
    parser.add_argument("--data", type=Path, default=_DATA, help="folder of the two archives")
    parser.add_argument("--sheet", type=Path, help="draw the training split's hits into this file")
    options = parser.parse_args()
    step = 10 if options.quick else 1
    if not all((options.data / name).exists() for name in _ARCHIVES):
        print_figures([], as_json=options.json)
        return
    train, test = _cifar10(options.data / _ARCHIVES[0])
    photographs = _photographs(options.data / _ARCHIVES[1])
    figures: list[Figure] = []

    def add(name: str, value: float, goal: float, against: str) -> None:
        is_recall = name.startswith("leak_recall")
        figures.append(
            figure(
                name,
                value,
                "share",
                goal=goal,
                direction="at_least" if is_recall else "at_most",
                against=against,
                quick=options.quick,
                seeds=[_SEED],
            )
        )

    sets = (
        ("cifar10", test, test[:: 5 * step]),
        ("photographs", photographs, photographs[::step]),
    )
    for name, originals, copied in sets:
        references = References.of(_thumbnails(originals))
        for kind, make in _COPIES.items():
            rng = np.random.default_rng(_SEED)
            copies = [(key, make(Image.open(io.BytesIO(data)), rng)) for key, data in copied]
            found = _search(copies, references)
            recall = len(found.rows) / len(copies)
            add(f"leak_recall_{kind}_{name}", recall, 0.95, f"{len(copies)} planted copies")
        if name == "cifar10":
            others = train[::step]
            started = time.perf_counter()
            found = _search(others, references)
            seconds = time.perf_counter() - started
            known = _copies_in_cifar10()
            hits = zip(found.rows.tolist(), found.references.tolist(), strict=True)
            names = [(others[row][0], originals[reference][0]) for row, reference in hits]
            num_false = sum(pair not in known for pair in names)
            against = (
                f"{len(names)} hits of {len(others)} training images in {seconds:.0f} s; all"
                f" but {num_false} of them are among the {len(known)} pairs that by eye show the"
                " same photograph"
            )
            add("leak_false_positives_cifar10", num_false / len(others), 0.001, against)
            if options.sheet is not None:
                _draw(options.sheet, found, others, originals)
    half = References.of(_thumbnails(photographs[::2]))
    found = _search(photographs[1::2], half)
    against = f"{len(found.rows)} hits of {len(photographs[1::2])} photographs"
    share = len(found.rows) / len(photographs[1::2])
    add("leak_false_positives_photographs", share, 0.001, against)
    print_figures(figures, as_json=options.json)


def _search(files: Files, references: References) -> Matches:
    descriptors = describe(_thumbnails(files)).astype(np.float16)
    return find_near_duplicates(descriptors, references, threshold=_THRESHOLD)


def _thumbnails(files: Files) -> NDArray[np.uint8]:
    with ThreadPoolExecutor() as pool:
        return np.stack(list(pool.map(lambda file: thumbnail(file[1], where=file[0]), files)))


def _saved(image: Image.Image, quality: int = 90) -> bytes:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def _reencoded(image: Image.Image, rng: np.random.Generator) -> bytes:
    return _saved(image, quality=int(rng.integers(50, 91)))


def _resized(image: Image.Image, rng: np.random.Generator) -> bytes:
    scale = np.exp(rng.uniform(np.log(0.5), np.log(2)))
    size = [max(1, round(scale * side)) for side in image.size]
    return _saved(image.resize((size[0], size[1]), Image.Resampling.BICUBIC))


def _cropped(image: Image.Image, rng: np.random.Generator) -> bytes:
    """Cut 0 to 5 % of the side off each border, of a small image 0 to 2 pixels."""
    width, height = image.size
    left, right = rng.integers(0, max(2, width // 20) + 1, 2).tolist()
    top, bottom = rng.integers(0, max(2, height // 20) + 1, 2).tolist()
    return _saved(image.crop((left, top, width - right, height - bottom)))


def _flipped(image: Image.Image, rng: np.random.Generator) -> bytes:
    return _saved(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT))


_COPIES: dict[str, Callable[[Image.Image, np.random.Generator], bytes]] = {
    "reencoded": _reencoded,
    "resized": _resized,
    "cropped": _cropped,
    "flipped": _flipped,
}


def _cifar10(path: Path) -> tuple[Files, Files]:
    """Return the files of the training and of the test split, by name."""
    found: dict[str, Files] = {"train": [], "test": []}
    with tarfile.open(path) as tar:
        for member in tar:
            parts = Path(member.name).parts
            if member.isfile() and member.name.endswith(".jpg"):
                found[parts[-3]].append(("/".join(parts[-3:]), _contents(tar, member)))
    return sorted(found["train"]), sorted(found["test"])


def _copies_in_cifar10() -> set[tuple[str, str]]:
    lines = _COPIES_IN_CIFAR10.read_text().splitlines()
    pairs = (line.split() for line in lines if not line.startswith("#"))
    return {(f"train/{train}.jpg", f"test/{test}.jpg") for train, test in pairs}


def _photographs(path: Path) -> Files:
    with tarfile.open(path) as tar:
        return sorted((member.name, _contents(tar, member)) for member in tar if member.isfile())


def _contents(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None, "a file, no link"
    return file.read()


def _draw(path: Path, found: Matches, others: Files, originals: Files) -> None:
    """Draw pairs, the image left and its reference right, least similar first."""
    columns, side = 12, 64
    order = np.argsort(found.similarities)
    rows = -(-len(order) // columns)
    sheet = Image.new("RGB", (columns * (2 * side + 8), rows * (side + 14)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, i in enumerate(order.tolist()):
        x, y = number % columns * (2 * side + 8), number // columns * (side + 14)
        pair = (others[found.rows[i]], originals[found.references[i]])
        for place, (_, data) in enumerate(pair):
            image = Image.open(io.BytesIO(data)).resize((side, side))
            sheet.paste(image, (x + place * side, y))
        draw.text((x, y + side), f"{pair[0][0][6:-4]} {found.similarities[i]:.3f}", fill="black")
    sheet.save(path)


if __name__ == "__main__":
    main()
