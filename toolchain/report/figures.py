"""A chart twice: a picture (SVG, drawn here) for print, phones and pages without JavaScript, and its Vega-Lite spec."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from typing import Any

from toolchain.report.palette import colour

WIDTH = 720
"""Pixels of a picture's plotting area. The live chart is as wide as its place on the page."""
FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif'


@dataclass(frozen=True, kw_only=True)
class Key:
    """One entry of a legend. Legends are HTML: they wrap on a phone, which those of Vega do not."""

    label: str
    colour: str
    style: str = "box"
    """``box``, ``solid``, ``dashed`` or ``dotted``."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    id: str
    title: str
    alt: str
    """What the picture shows, for people who do not see it."""
    svg: str
    spec: str
    """Vega-Lite JSON, safe inside a script element."""
    keys: tuple[Key, ...] = ()
    note: str = ""
    kind: str = "figure"


def draw(
    chart: Any,
    *,
    id: str,
    title: str,
    alt: str,
    keys: tuple[Key, ...] = (),
    note: str = "",
    height: int = 220,
    width: int = 0,
) -> Figure:
    """Render an altair chart (one view or layers of one). ``width``: of the picture's plotting area, else WIDTH."""
    import vl_convert

    spec = chart.properties(width=width or WIDTH, height=height).configure(**style()).to_dict()
    del spec["$schema"]  # an address: nothing fetches it, but a page without addresses is easier to trust
    svg = vl_convert.vegalite_to_svg(spec, vl_version=vegalite_version())
    return Figure(id=id, title=title, alt=alt, svg=squeeze(svg), spec=embeddable(spec), keys=keys, note=note)


def style() -> dict[str, Any]:
    """The ``config`` of every chart."""
    ink, soft, line = colour("ink"), colour("soft"), colour("line")
    axis = {
        "labelColor": soft, "titleColor": soft, "domainColor": line, "tickColor": line, "gridColor": line,
        "labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": "normal", "titlePadding": 8, "tickSize": 4,
        "gridOpacity": 0.6, "labelOverlap": True,
    }  # fmt: skip
    return {
        "aria": False,
        "background": "transparent",
        "font": FONT,
        "padding": {
            "left": 14,
            "right": 8,
            "top": 4,
            "bottom": 4,
        },  # readers' fonts are wider than the one measured
        "view": {"stroke": None},
        "axis": axis,
        "axisBand": {"grid": False},
        "text": {"fontSize": 12, "color": ink},
        "rule": {"color": soft},
    }


@cache
def vegalite_version() -> str:
    """The newest version that vl-convert has of the major version for which altair writes: 6.4."""
    import altair
    import vl_convert

    wanted = altair.SCHEMA_VERSION.removeprefix("v").split(".")[:2]
    known = [tuple(map(int, version.split("."))) for version in vl_convert.get_vegalite_versions()]
    major = int(wanted[0])
    fitting = [version for version in known if version[0] == major]
    major, minor = max(fitting or known)
    return f"{major}.{minor}"


@cache
def runtime() -> str:
    """JavaScript that puts ``vegaEmbed`` into the page: Vega, Vega-Lite and the embedder, without any request."""
    import vl_convert

    bundle: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=vegalite_version())
    return bundle.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def embeddable(value: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(value, separators=(",", ":"), sort_keys=True, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


_RECTS = re.compile(r'(<g class="mark-rect[^>]*>)((?:<path d="[^"]*"[^>]*/>)+)(</g>)')
_PATH = re.compile(r'<path d="([^"]*)"([^>]*)/>')
_TAG = re.compile(r"<[^>]*>")
_NUMBER = re.compile(r"-?\d+\.\d{3,}")
_NOISE = re.compile(
    r'<path class="(?:background|foreground)"[^>]*/>| font-family="[^"]*"| aria-roledescription="[^"]*"'
    r'| role="graphics-[a-z]*"| aria-hidden="true"| pointer-events="none"'
)
"""Invisible paths; what the figure around the picture says once; the font, which moves to the root."""


def squeeze(svg: str) -> str:
    """A smaller picture that looks the same: rectangles of one look become one path, coordinates two decimals (labels
    keep all of theirs).

    A heat map of 94 layers x 128 experts has 12,032 rectangles: 1.5 MB as Vega writes them, 0.2 MB after this.
    """

    def merge(found: re.Match[str]) -> str:
        looks: dict[str, list[str]] = {}
        for path, look in _PATH.findall(found[2]):
            looks.setdefault(look, []).append(path)
        merged = "".join(f'<path d="{"".join(paths)}"{look}/>' for look, paths in looks.items())
        return found[1] + merged + found[3]

    short = _TAG.sub(
        lambda tag: _NUMBER.sub(lambda found: f"{float(found[0]):.2f}", tag[0]), _NOISE.sub("", svg)
    )
    font = FONT.replace('"', "&quot;")
    return _RECTS.sub(merge, short).replace("<svg ", f'<svg font-family="{font}" aria-hidden="true" ', 1)
