"""Figures: inline SVG whose colours follow the page, be it light, dark or paper, and plain PNG.

matplotlib is imported when a figure is drawn, because every flow process imports this module.
"""

import base64
import io
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, cast

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Drawn in the colours on the left, which become the variables on the right of the page's style
# sheet: Okabe and Ito's palette, whose hues also differ for colour-blind readers. No meaning hangs
# on colour alone: markers, line styles and hatches differ as well.
TEXT, GRID = "#010203", "#040506"
BLUE, ORANGE, GREEN, RED = "#0072b2", "#e69f00", "#009e73", "#d55e00"
PURPLE, SKY, GREY = "#cc79a7", "#56b4e9", "#8a8a8a"
_VARIABLES = {
    TEXT: "currentColor",
    GRID: "var(--grid)",
    BLUE: "var(--blue)",
    ORANGE: "var(--orange)",
    GREEN: "var(--green)",
    RED: "var(--red)",
    PURPLE: "var(--purple)",
    SKY: "var(--sky)",
    GREY: "var(--grey)",
}
_LIGHT_GREY = "#d0d0d0"
PAGE_INCHES = 10.4
_SETTINGS: dict[str, Any] = {
    "svg.fonttype": "none",  # text stays text, in the page's font, in any script
    "text.parse_math": False,  # a class may be called "$x$"
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.edgecolor": GRID,
    "axes.labelcolor": TEXT,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "text.color": TEXT,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": TEXT,
    "ytick.labelcolor": TEXT,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "hatch.linewidth": 0.7,
}


@contextmanager
def plain_matplotlib(settings: Mapping[str, Any]) -> Iterator[None]:
    """Draw under these settings alone, and without warnings of scripts that its font lacks."""
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()  # whatever the user's matplotlibrc says
        cast("dict[str, Any]", matplotlib.rcParams).update(settings)
        # Of an SVG the browser draws the text; matplotlib only measures it.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def draw_svg(
    draw: "Callable[[Figure], None]",
    name: str,
    label: str,
    *,
    height: float,
    width: float = PAGE_INCHES,
) -> str:
    """Draw a figure and return it as an SVG element whose texts matplotlib has escaped."""
    from matplotlib.figure import Figure

    buffer = io.StringIO()
    with plain_matplotlib(_SETTINGS | {"svg.hashsalt": name}):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure)
        no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    svg = buffer.getvalue()
    body = svg[svg.index(">", svg.index("<svg")) + 1 :]
    # The style sheet would hold for the whole page; report.css has its one rule.
    body = re.sub(r"<(metadata|style)\b.*?</\1>", "", body, flags=re.DOTALL)
    # Names that recur in every figure; the ones that are referred to are salted with `name`.
    body = re.sub(r'<g id="[^"]*">', "<g>", body)
    # Only in attributes: the texts are other people's.
    body = re.sub(r'style="[^"]*"', lambda style: _themed(style.group()), body)
    box = f"{72 * width:g} {72 * height:g}"
    share = 100 * width / PAGE_INCHES
    return (
        f'<svg class="figure" role="img" aria-label="{label}" viewBox="0 0 {box}"'
        f' style="max-width: {share:.0f}%">{body}'
    )


def draw_png(
    draw: "Callable[[Figure], None]",
    name: str,
    label: str,
    *,
    height: float,
    width: float = PAGE_INCHES,
) -> str:
    """Draw a figure on white and return it as a data URL, for pages that take no SVG."""
    from matplotlib.figure import Figure

    buffer = io.BytesIO()
    on_white = {key: _LIGHT_GREY for key, value in _SETTINGS.items() if value == GRID}
    with plain_matplotlib(_SETTINGS | on_white):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure)
        about = {"Title": name, "Description": label, "Software": None}
        figure.savefig(buffer, format="png", dpi=100, facecolor="white", metadata=about)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _themed(style: str) -> str:
    for color, variable in _VARIABLES.items():
        style = style.replace(color, variable)
    return style


def legend(figure: "Figure", place: Literal["upper right", "lower center"]) -> None:
    """Give a figure one legend, outside its panels, that names what occurs in any of them once."""
    found: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    columns = 7 if figure.get_figwidth() > PAGE_INCHES / 2 else 2
    location: Any = f"outside {place}"  # matplotlib's types know it not
    figure.legend(list(found.values()), list(found), loc=location, ncols=columns)
