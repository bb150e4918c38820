"""SVG as escaped text: elements, axes and rounding.

Colours are set twice on purpose: as attributes, so that a figure stands alone, and as classes (`fg`, `muted`, `grid`,
`series-0` …), so that a page's style sheet, which wins over attributes, can follow a dark or a light theme.
"""

from __future__ import annotations

import math

from markupsafe import Markup, escape

from rayclust.report.formats import clean, shorten

PALETTE = ("#4f63d9", "#d9822b", "#1f9d83", "#c2449b", "#7a8a99")
"""Colours of the series, told apart by colour-blind readers too; the page has a brighter set for the dark theme."""
HUES = ("#0072b2", "#d55e00", "#009e73", "#cc5fa0", "#56b4e9", "#e69f00", "#7b5fc4", "#8a7a5c")
"""Colours of clusters: Okabe and Ito's for colour-blind readers, yellow and black, which one of two themes swallows,
replaced. Classes `hue-0` … (areas) and `line-hue-0` … (strokes)."""
DARK_HUES = ("#4f9fe0", "#ff8a4c", "#3fc79a", "#ea8fc0", "#9bdcff", "#ffc555", "#b29bf0", "#b8a98c")
"""The same on a dark ground."""
GREY = "#7d8590"
FONT = "ui-sans-serif, system-ui, sans-serif"

Attribute = str | int | float | None


def coordinate(value: float) -> str:
    """At most two decimals and no trailing zeros: the same text on every machine."""
    text = f"{value:.2f}".rstrip("0").rstrip(".")
    return "0" if text in ("-0", "") else text


def element(tag: str, *children: str, **attributes: Attribute) -> Markup:
    """One element with escaped attributes and children.

    Args:
        tag: the element's name.
        children: text, which is escaped and cut to 300 characters, or other elements.
        attributes: `class_` stands for `class`, other underscores for hyphens; None leaves an attribute out.
    """
    written = []
    for name, value in attributes.items():
        if value is None:
            continue
        text = coordinate(value) if isinstance(value, float) else clean(str(value))
        written.append(f' {name.rstrip("_").replace("_", "-")}="{escape(text)}"')
    inner = "".join(
        child if isinstance(child, Markup) else str(escape(clean(shorten(child, 300)))) for child in children
    )
    return Markup(f"<{tag}{''.join(written)}>{inner}</{tag}>")  # noqa: S704 - every part is escaped above


def figure(width: float, height: float, title: str, *children: str) -> Markup:
    """A drawing of `width` × `height` units that scales to its place and tells its title to a screen reader."""
    return element(
        "svg",
        element("title", title),
        *children,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {coordinate(width)} {coordinate(height)}",
        width=coordinate(width),
        height=coordinate(height),
        role="img",
        font_family=FONT,
        font_size=12,
    )


_DARK_RULES = "".join(
    f".hue-{place}{{fill:{hue}}}.line-hue-{place}{{stroke:{hue}}}" for place, hue in enumerate(DARK_HUES)
)
STANDALONE = f"""
.fg{{fill:#1b1d21}}.muted{{fill:#5d646d}}.halo{{stroke:#fff}}
@media (prefers-color-scheme:dark){{.fg{{fill:#ececea}}.muted{{fill:#a0a6ae}}.halo{{stroke:#1b1d21}}
.heat{{fill:#b9c3ff}}.heat-stop{{stop-color:#b9c3ff}}.ground{{fill:#1b1d21}}{_DARK_RULES}}}
"""
"""What a figure in a file of its own knows of themes; on a page the page's style sheet says more."""


def standalone(drawing: str, description: str = "") -> str:
    """A drawing made by `figure`, as a file of its own: on a ground, in a light or a dark theme, with its caption."""
    head, _, rest = drawing.partition(">")
    ground = '<rect class="ground" width="100%" height="100%" fill="#ffffff"/>'
    caption = f"<desc>{escape(clean(description))}</desc>" if description else ""
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{head}><style>{STANDALONE}</style>{caption}{ground}{rest}\n'


def text(x: float, y: float, content: str, *, anchor: str = "start", class_: str = "muted") -> Markup:
    """A line of text whose baseline begins, ends or has its middle at (x, y)."""
    return element("text", content, x=float(x), y=float(y), text_anchor=anchor, class_=class_, fill=GREY)


def rectangle(x: float, y: float, width: float, height: float, title: str, *, series: int = 0) -> Markup:
    """A bar with a tooltip."""
    return element(
        "rect",
        element("title", title),
        x=float(x),
        y=float(y),
        width=float(width),
        height=float(height),
        rx=2,
        class_=f"series-{series % len(PALETTE)}",
        fill=PALETTE[series % len(PALETTE)],
    )


def rule(x1: float, y1: float, x2: float, y2: float) -> Markup:
    """A thin line of a grid."""
    ends = {"x1": float(x1), "y1": float(y1), "x2": float(x2), "y2": float(y2)}
    return element("line", class_="grid", stroke=GREY, stroke_opacity=0.25, **ends)


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers from at most `low` to at least `high`, about `wanted` of them, a 1-2-5 step apart."""
    if not high > low:
        high = low + (abs(low) or 1.0)
    raw = (high - low) / max(1, wanted - 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next(multiple for multiple in (1, 2, 5, 10) if power * multiple >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]
