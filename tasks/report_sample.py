"""A picture of one image with what each round made of it, as PNG."""

import io
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from tasks.images import decode_image
from tasks.report_svg import plain_matplotlib

_PIXELS = 512
_INCHES = 5.0
_LINE_INCHES = 0.22


@dataclass(frozen=True)
class Caption:
    """The lines about one round; `is_kept` colours them, and their text says it, too."""

    lines: tuple[str, ...]
    is_kept: bool


def sample_picture(data: bytes, *, title: str, captions: Sequence[Caption], where: str) -> bytes:
    """Return an image file enlarged, with its captions beside it.

    Small images are enlarged pixel by pixel, so that what the network saw is seen.

    Raises: BadImage, naming `where`.
    """
    from matplotlib.figure import Figure

    image = _enlarged(decode_image(data, where=where))
    num_lines = sum(len(one.lines) + 1 for one in captions)
    height = max(_INCHES, _LINE_INCHES * (num_lines + 2))
    buffer = io.BytesIO()
    with plain_matplotlib({"text.parse_math": False}):  # a class may be called "$x$"
        figure = Figure(figsize=(2 * _INCHES + 1, height), layout="constrained", dpi=100)
        figure.suptitle(title, fontsize=11)
        picture, text = figure.subplots(1, 2)
        picture.imshow(image)
        for axes in (picture, text):
            axes.set_axis_off()
        line = _LINE_INCHES / height
        place = 1.0
        for caption in captions:
            color = "#00664b" if caption.is_kept else "#9c3d00"
            for number, shown in enumerate(caption.lines):
                weight = "bold" if number == 0 else "normal"
                text.text(
                    *(0, place, shown), transform=text.transAxes, color=color, fontweight=weight,
                    fontsize=9, verticalalignment="top",
                )  # fmt: skip
                place -= line
            place -= line
        # Neither date nor version: the same image and captions give the same picture.
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _enlarged(image: Image.Image) -> Image.Image:
    factor = _PIXELS // max(image.size)
    if factor < 2:
        return image
    size = (image.width * factor, image.height * factor)
    return image.resize(size, Image.Resampling.NEAREST)
