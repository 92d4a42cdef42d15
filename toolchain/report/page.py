"""A Page as one HTML file: no request leaves it, and its own policy forbids any."""

from __future__ import annotations

import base64
import hashlib
from importlib import resources

from toolchain import __version__
from toolchain.report import figures
from toolchain.report.blocks import Page
from toolchain.report.palette import DARK, LIGHT, variables

GENERATOR = "toolchain report"
"""Start of the page's ``generator``; a file that has it may be replaced by the next report."""
TEMPLATES = "templates"


def render(page: Page) -> str:
    """HTML. The same page gives the same bytes: no clock, no random identifiers.

    Scripts run only if their hash stands in the Content-Security-Policy of the page, so that text which slips through
    as markup still cannot run; images come from the file itself, and everything else is forbidden.
    """
    from jinja2 import Environment, StrictUndefined

    scripts = [_read("page.js")]
    if page.figures:
        scripts.insert(0, figures.runtime())
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(_read("page.html.j2")).render(
        page=page,
        generator=f"{GENERATOR} {__version__}",
        style=_themes() + _read("style.css"),
        scripts=scripts,
        script_hashes=[_hash(script) for script in scripts],
    )


def _read(name: str) -> str:
    return (resources.files("toolchain.report") / TEMPLATES / name).read_text(encoding="utf-8")


def _hash(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _themes() -> str:
    """Dark by the system's wish or by hand; paper is always light."""
    light, dark = variables(LIGHT), variables(DARK)
    return (
        f":root{{{light}}}\n"
        f'@media screen and (prefers-color-scheme:dark){{:root:not([data-theme="light"]){{{dark}color-scheme:dark}}}}\n'
        f'@media screen{{:root[data-theme="dark"]{{{dark}}}}}\n'
    )
