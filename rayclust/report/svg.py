"""matplotlib's figures as SVG that any page can inline, in the colours of a light or a dark theme.

matplotlib is imported when the first chart is drawn. `write` rewrites its SVG: no ids, inline styles or scripts, no
references but the links of shapes, coordinates in two decimals, tooltips as `title` elements. A colour is set twice: as
an attribute, so that a chart stands alone, and as a class (`fg`, `muted`, `grid`, `hue-0` …), so that a style sheet,
which wins over attributes, can follow the theme.
"""

from __future__ import annotations

import base64
import io
import re
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree as ET

import numpy as np
from markupsafe import Markup, escape
from PIL import Image

from rayclust.arrays import FloatArray
from rayclust.report.formats import clean, number, shorten

if TYPE_CHECKING:  # imported where a chart is drawn: it takes half a second
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HUES = ("#0072b2", "#d55e00", "#009e73", "#cc5fa0", "#56b4e9", "#e69f00", "#7b5fc4", "#8a7a5c")
"""Colours of clusters and series: Okabe and Ito's for colour-blind readers, yellow and black, which one of two themes
swallows, replaced. Classes `hue-0` … (areas) and `line-hue-0` … (strokes)."""
DARK_HUES = ("#4f9fe0", "#ff8a4c", "#3fc79a", "#ea8fc0", "#9bdcff", "#ffc555", "#b29bf0", "#b8a98c")
"""The same on a dark ground."""
INK, GREY, ON_HUE, HEAT = "#1b1d21", "#7d8590", "#ffffff", "#4450c8"
"""Colours of names, of other text and lines, of text on a hue, and of heat-maps."""
SHADES = 16
"""Levels of a heat-map, half a byte each: in a field of dots nobody sees more, and noise does not compress."""
HALO = "halo"
"""`gid` of a text with an outline in the colour of the ground."""

_TIP, _HREF = "tip:", "{http://www.w3.org/1999/xlink}href"
_FILLS = {INK: "fg", GREY: "muted", ON_HUE: "on-series"} | {hue: f"hue-{i}" for i, hue in enumerate(HUES)}
_STROKES = {GREY: "grid"} | {hue: f"line-hue-{i}" for i, hue in enumerate(HUES)}
_ATTRIBUTES = (
    *("fill", "stroke", "stroke-width", "stroke-linecap", "stroke-dasharray", "opacity", "fill-opacity"),
    *("stroke-opacity", "text-anchor", "font-weight", "font-size"),
)
_DEFAULTS = {"text-anchor": "start", "font-size": "12px", "stroke-width": "1"}
_ROOT = {"role": "img", "font-family": "ui-sans-serif, system-ui, sans-serif", "font-size": "12"}
_DARK_RULES = "".join(f".hue-{i}{{fill:{hue}}}.line-hue-{i}{{stroke:{hue}}}" for i, hue in enumerate(DARK_HUES))
_STANDALONE = f"""
.fg{{fill:{INK}}}.muted{{fill:#5d646d}}.halo{{stroke:#fff;stroke-width:3.5px;stroke-linejoin:round;paint-order:stroke}}
@media (prefers-color-scheme:dark){{.fg{{fill:#ececea}}.muted{{fill:#a0a6ae}}.halo{{stroke:{INK}}}.ground{{fill:{INK}}}
.heat{{filter:brightness(1.6)}}{_DARK_RULES}}}
"""
_SETTINGS: dict[str, Any] = {
    "svg.hashsalt": "rayclust",
    "svg.fonttype": "none",
    "text.parse_math": False,
    "path.simplify": False,  # it would merge dots
    "font.family": ["DejaVu Sans"],  # comes with matplotlib, so that text has the same size on every machine
    "font.size": 12,
    **dict.fromkeys(("axes.titlesize", "axes.labelsize", "xtick.labelsize", "ytick.labelsize", "legend.fontsize"), 12),
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor", "grid.color"), GREY),
    **dict.fromkeys(("xtick.bottom", "ytick.left", "legend.frameon"), False),
    "axes.titlecolor": INK,
    "axes.axisbelow": True,
    "grid.alpha": 0.25,
    "grid.linewidth": 1.0,
    "lines.linewidth": 2.0,
    "lines.solid_capstyle": "round",
}
_DRAWING = threading.Lock()  # matplotlib's settings are global while a chart is drawn


@contextmanager
def styled() -> Iterator[None]:
    """Draw under matplotlib's defaults and our settings, and restore those of the process; decorates charts."""
    import matplotlib as mpl

    with _DRAWING, mpl.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of letters that the font lacks: the reader's browser has them
        mpl.rcdefaults()
        mpl.rcParams.update(_SETTINGS)
        yield


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure without a ground; one unit is a pixel where the page has room."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width / 72, height / 72), dpi=72, frameon=False)


def add_axes(
    figure: Figure,
    left: float,
    top: float,
    width: float,
    height: float,
    *,
    x: tuple[float, float],
    y: tuple[float, float] = (0, 1),
    y_ticks: Sequence[float] = (),
    is_log: bool = False,
) -> Axes:
    """Add axes without a frame, placed in units from the figure's upper left corner.

    The spans are `x` from left to right and `y` from the bottom to the top, or that of `y_ticks`, which have a grid.
    """
    from matplotlib.ticker import FuncFormatter, NullLocator

    across, down = figure.get_size_inches() * 72
    axes = figure.add_axes((left / across, 1 - (top + height) / down, width / across, height / down))
    axes.set(xscale="log" if is_log else "linear", xlim=x, ylim=(y_ticks[0], y_ticks[-1]) if y_ticks else y)
    axes.patch.set_visible(False)
    axes.spines[:].set_visible(False)
    axes.set_xticks([])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value, 6)))
    axes.set_yticks(y_ticks)
    axes.grid(visible=bool(y_ticks), axis="y")
    return axes


def shade(axes: Axes, shares: FloatArray) -> None:
    """Fill axes with Float[n m] in shades of one colour, 0 clear and 1 and above the full colour, and frame them."""
    levels = np.rint(np.clip(np.nan_to_num(shares), 0, 1) * (SHADES - 1)) * (255 // (SHADES - 1))
    pixels = np.zeros((*levels.shape, 4), np.uint8)
    pixels[..., :3], pixels[..., 3] = tuple(bytes.fromhex(HEAT[1:])), levels
    if pixels.size:
        axes.imshow(pixels, extent=(*axes.get_xlim(), *axes.get_ylim()), aspect="auto", interpolation="none")
    axes.patch.set(visible=True, facecolor="none", edgecolor=GREY, linewidth=1, alpha=0.5)


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Return about `wanted` round numbers a 1-2-5 step apart that cover a range; that of one value is widened."""
    from matplotlib.ticker import MaxNLocator

    if not high > low:
        high = low + (abs(low) or 1.0)
    places = MaxNLocator(max(1, wanted - 1), steps=[1, 2, 5, 10]).tick_values(float(low), float(high))
    return [float(tick) + 0.0 for tick in places]  # no -0


def one_line(text: str, limit: int = 24) -> str:
    """Return a name as one short line that XML can hold."""
    return shorten(" ".join(clean(text).split()), limit, at_end=True)


def tooltip(text: str) -> str:
    """Return the `gid` that gives a shape a tooltip."""
    return _TIP + shorten(clean(text), 300)


def write(figure: Figure, title: str) -> Markup:
    """Return a figure as one `svg` element that scales to its container, titled for screen readers.

    Shapes that have a URL become links.
    """
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    buffer = io.StringIO()
    FigureCanvasSVG(figure).print_svg(buffer, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    width, height = (_short(f"{inches * 72:f}") for inches in figure.get_size_inches())
    size = {"viewBox": f"0 0 {width} {height}", "width": width, "height": height}
    root = ET.Element("svg", {"xmlns": "http://www.w3.org/2000/svg", **size, **_ROOT, "stroke-linejoin": "round"})
    ET.SubElement(root, "title").text = shorten(clean(title), 300)
    root.extend(_inlined(ET.fromstring(buffer.getvalue())))  # noqa: S314 - our own text
    if root.find("a") is not None:
        root.set("role", "group")  # of an image screen readers skip the parts
    return Markup(ET.tostring(root, encoding="unicode"))  # noqa: S704 - ElementTree escapes every string


def standalone(chart: str, description: str = "") -> str:
    """Return a chart as a file of its own: on a ground, in a light or a dark theme, with how to read it."""
    head, _, rest = chart.partition(">")
    ground = f'<rect class="ground" width="100%" height="100%" fill="{ON_HUE}"/>'
    caption = f"<desc>{escape(clean(description))}</desc>" if description else ""
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{head}><style>{_STANDALONE}</style>{caption}{ground}{rest}\n'


def _inlined(node: ET.Element) -> list[ET.Element]:
    """Return an element's shapes, texts, images and links; groups dissolve, their ids become tooltips or classes."""
    tag, group = node.tag.rpartition("}")[2], node.get("id", "")
    if tag in ("path", "text", "image"):
        return [_inlined_shape(node, tag)]
    if tag not in ("svg", "g", "a"):
        return []
    shapes = [shape for inner in node for shape in _inlined(inner)]
    if tag == "a":
        link = ET.Element("a", {"href": node.attrib[_HREF]})
        link.extend(shapes)
        return [link]
    if group.startswith(_TIP):
        for shape in shapes[:1]:
            ET.SubElement(shape, "title").text = group.removeprefix(_TIP)
    elif group == HALO:
        for shape in shapes:
            shape.set("class", f"{shape.get('class', '')} {HALO}".strip())
    return shapes


def _inlined_shape(node: ET.Element, tag: str) -> ET.Element:
    """Return a shape with attributes and classes instead of matplotlib's inline style."""
    attributes = dict(part.split(": ", 1) for part in node.get("style", "").split("; ") if ": " in part)
    attributes = {
        name: attributes[name] for name in _ATTRIBUTES if name in attributes and attributes[name] != _DEFAULTS.get(name)
    }
    if tag == "image":  # a heat-map, in half a byte a pixel; matplotlib takes four
        # 1. Levels, from the alpha channel of matplotlib's image.
        encoded = node.attrib[_HREF].partition(",")[2]
        alpha = np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))).getchannel("A"))
        step, buffer = 255 // (SHADES - 1), io.BytesIO()
        # 2. The same levels as a palette of one colour with 16 opacities.
        picture = Image.fromarray(alpha // step).convert("P")
        picture.putpalette(bytes.fromhex(HEAT[1:]) * SHADES)
        picture.save(buffer, "PNG", optimize=True, bits=4, transparency=bytes(range(0, 256, step)))
        source = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
        # 3. Place and size, from the matrix that matplotlib scales a pixel with.
        across, _, _, down, x, y = map(float, re.findall(r"[-.\d]+", node.attrib["transform"]))
        box = {"x": x, "y": y, "width": across * alpha.shape[1], "height": down * alpha.shape[0]}
        attributes |= {name: _short(f"{value:f}") for name, value in box.items()}
        attributes |= {"href": source, "class": "heat", "preserveAspectRatio": "none"}
        attributes["image-rendering"] = "pixelated" if len(alpha) < 100 else "auto"
    else:
        attributes |= {name: _short(node.attrib[name]) for name in ("d", "x", "y", "transform") if name in node.attrib}
        if attributes.get("transform", "").startswith("rotate(0 "):
            del attributes["transform"]
        classes = [_FILLS.get(attributes.get("fill", "")), _STROKES.get(attributes.get("stroke", ""))]
        attributes |= {"class": " ".join(filter(None, classes))} if any(classes) else {}
    shape = ET.Element(tag, attributes)
    shape.text = node.text if tag == "text" else None
    return shape


def _short(text: str) -> str:
    """Round the numbers of an attribute to two decimals, and drop the spaces and lines that a path can do without."""
    text = re.sub(r"-?\d+\.\d+", lambda match: f"{float(match[0]):.2f}".rstrip("0").rstrip("."), text)
    text = re.sub(r" ?([MLCQz]) ?", r"\1", re.sub(r"-0(?![.\d])", "0", " ".join(text.split())))
    return re.sub(r"M(\S+) (\S+)L\1 \2(?=M|$)", r"M\1 \2h0", text)  # a line of no length, with round ends, is a dot
