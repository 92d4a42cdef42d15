"""Colours, as CSS variables with a fallback: the page's style sheet gives each its value for light and dark.

A picture thus follows the theme of the page without being drawn again, and still has colours when it is saved alone.
Categories were chosen to differ in lightness as well as in hue, so that they stay apart for the common kinds of colour
blindness and in grey print; dash patterns, markers and words say the same a second time.
"""

from __future__ import annotations

LIGHT = {
    "page": "#ffffff",
    "ink": "#1b1f24",
    "soft": "#545d68",
    "line": "#d5dae0",
    "tint": "#fae3cd",
    "none": "#c9d0d8",
    "c1": "#1f5fa8",
    "c2": "#c25e00",
    "c3": "#1a8570",
    "c4": "#8f3f86",
    "c5": "#7d6608",
    "c6": "#57606a",
    "bad": "#b3261e",
    "good": "#1a6e37",
    "h0": "#e4ecf5",
    "h1": "#c3d6ea",
    "h2": "#97b9da",
    "h3": "#6496c5",
    "h4": "#3a72ab",
    "h5": "#1e4f86",
    "h6": "#0c2f58",
}
"""Name -> colour on a white page. Text (ink, soft, bad, good) has a contrast of 4.5 or more, marks (c1 to c6) of 3."""

DARK = {
    "page": "#15191e",
    "ink": "#e4e8ec",
    "soft": "#a3adb8",
    "line": "#353c45",
    "tint": "#4d3214",
    "none": "#4c5560",
    "c1": "#6fb0f2",
    "c2": "#f29a4a",
    "c3": "#55c7ac",
    "c4": "#d691ce",
    "c5": "#d3bb55",
    "c6": "#a3adb8",
    "bad": "#ff8f85",
    "good": "#6fce8f",
    "h0": "#1d2a3a",
    "h1": "#23405f",
    "h2": "#2c5a87",
    "h3": "#3f7ab1",
    "h4": "#639ed4",
    "h5": "#96c4ee",
    "h6": "#d3e8fc",
}
"""The same names on a dark page; the ramp h0 to h6 grows away from the page in both."""

CATEGORIES = ("c1", "c2", "c3", "c4", "c5", "c6")
RAMP = ("h0", "h1", "h2", "h3", "h4", "h5", "h6")


def colour(name: str) -> str:
    """What a mark is filled with."""
    return f"var(--{name},{LIGHT[name]})"


def categories(count: int) -> list[str]:
    """``count`` colours; after six they repeat, and only words tell them apart."""
    return [colour(CATEGORIES[index % len(CATEGORIES)]) for index in range(count)]


def variables(theme: dict[str, str]) -> str:
    """CSS declarations."""
    return "".join(f"--{name}:{value};" for name, value in theme.items())
