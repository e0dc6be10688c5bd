"""Charts of a report as SVG: text and axes take the page's own colour, so that they suit light and dark."""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fl_split.errors import ConfigError

_INK = "#010203"  # what becomes the page's own colour
_COLOURS = ("#2a78d6", "#eb6834", "#1baf7a", "#b58900", "#d55f9b", "#7a6be0", "#e34948", "#6b7a8c")
_DASHES = ("-", "--", ":", "-.")  # beyond eight lines

Line = Mapping[float, float]  # by x


@dataclass(frozen=True)
class Chart:
    """One picture: lines over rounds or steps."""

    title: str
    x: str
    y: str
    lines: Mapping[str, Line]
    levels: Mapping[str, float] | None = None  # dashed horizontal lines, of the line of the same name
    whole: bool = True  # x is whole numbers and each is marked


def draw(chart: Chart) -> str:
    """Make an ``<svg>`` element.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        raise ConfigError("'fl-split report' draws with matplotlib: pip install 'fl-split[report]'") from None
    style: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": "fl-split",
        "font.family": "sans-serif",
        "font.size": 10,
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK),
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(5.2, 2.9), layout="constrained")
        axes = figure.subplots()
        for place, (name, line) in enumerate(chart.lines.items()):
            colour, dash = look(place)
            marker = "o" if chart.whole else None
            axes.plot(list(line), list(line.values()), dash, color=colour, marker=marker, ms=4, lw=1.8)
            if chart.levels and name in chart.levels:
                axes.axhline(chart.levels[name], color=colour, lw=1, ls=(0, (2, 3)))
        axes.set(xlabel=chart.x, ylabel=chart.y)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        places = {x for line in chart.lines.values() for x in line}
        if len(places) == 1:  # matplotlib would write parts of a round
            (x,) = places
            axes.set_xlim(x - 1, x + 1)
            axes.set_xticks([x])
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color=_INK, alpha=0.12, lw=0.8)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return _inline(file.getvalue(), chart.title)


def look(place: int) -> tuple[str, str]:
    """Colour and dashes of a chart's lines, by their place."""
    return _COLOURS[place % len(_COLOURS)], _DASHES[place // len(_COLOURS) % len(_DASHES)]


def _inline(svg: str, title: str) -> str:
    """Cut out the element, as wide as its place, with a name for who cannot see it."""
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    svg = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', rf'<svg \1 role="img" aria-label="{title}">', svg, count=1)
    return re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)


def steps_of(entries: Sequence[Mapping[str, Any]]) -> Line:
    """A node's loss by step, out of its own ``metrics.jsonl``."""
    return {entry["step"]: entry["loss"] for entry in entries if "step" in entry}
