"""The SPEC of a sweep: a YAML mapping of axes, and of what all cells have in common."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from toolchain.core.errors import UsageError
from toolchain.pipeline.request import EngineRequest

PLURALS = {
    "models": "model",
    "formats": "format",
    "recipes": "recipe",
    "policies": "policy",
    "kv_caches": "kv_cache",
    "gpus": "gpu",
    "targets": "target",
    "seeds": "seed",
}
"""Axes that read better in the plural -> key of an engine spec."""
OWN = ("name", "base", "exclude", "include")
"""Keys of a sweep that are no axes."""
KEYS = tuple(item.name for item in fields(EngineRequest))
Values = dict[str, Any]
"""Key of an engine spec -> its value."""


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A SPEC that was read. Keys are those of engine specs, in the singular."""

    name: str
    axes: dict[str, list[Any]]
    """Key -> its values, in the order in which they vary: the last one fastest."""
    base: Values = field(default_factory=dict)
    """What every cell has, where no axis says otherwise."""
    exclude: tuple[dict[str, list[Any]], ...] = ()
    """A cell of the grid that has one of the values for each key of one of these is left out."""
    include: tuple[Values, ...] = ()
    """Cells beside the grid, over ``base``."""
    labels: dict[str, str] = field(default_factory=dict)
    """MODEL -> what it is called in names of cells, where the SPEC says so."""


def read_sweep(path: Path) -> Sweep:
    """UsageError TC-007 for what is no sweep; unknown keys are named, each with the nearest known one."""
    import yaml

    if not path.is_file():
        raise UsageError(
            f"spec {path} does not exist", hint="give a YAML file with axes: models, formats", code="TC-007"
        )
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid YAML: {error}", code="TC-007") from error
    return _sweep(_mapping(value, str(path)), path)


def _sweep(value: Mapping[str, Any], path: Path) -> Sweep:
    given = {_plain(key): item for key, item in value.items()}
    axes = _engine_keys({key: item for key, item in given.items() if key not in OWN}, str(path), more=OWN)
    labels: dict[str, str] = {}
    if isinstance(axes.get("model"), Mapping):
        labels = {str(model): str(label) for label, model in axes["model"].items()}
        axes["model"] = list(axes["model"].values())
    called = {label: model for model, label in labels.items()}
    sweep = Sweep(
        name=_name(given.get("name") or path.stem, path),
        axes={key: _axis(key, item, path) for key, item in axes.items()},
        base=_cell_keys(given.get("base") or {}, f"{path}: base", called),
        exclude=tuple(
            {key: item if isinstance(item, list) else [item] for key, item in entry.items()}
            for entry in _entries(given, "exclude", path, called)
        ),
        include=tuple(_entries(given, "include", path, called)),
        labels=labels,
    )
    _refuse_incomplete(sweep, path)
    return sweep


def _name(value: Any, path: Path) -> str:
    """It becomes a directory."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._+-]*", str(value)):
        raise _unusable(
            f"{path}: name {str(value)!r}", hint="letters, digits and . _ + - make a directory's name"
        )
    return str(value)


def _entries(given: Mapping[str, Any], key: str, path: Path, called: Mapping[str, str]) -> list[Values]:
    entries = given.get(key) or []
    if not isinstance(entries, list):
        raise _unusable(f"{path}: {key} is {type(entries).__name__}, expected a list of mappings")
    return [_cell_keys(entry, f"{path}: {key}", called) for entry in entries]


def _cell_keys(value: Any, where: str, called: Mapping[str, str]) -> Values:
    """One mapping of engine keys; a model may be given by its label."""
    found = _engine_keys({_plain(key): item for key, item in _mapping(value, where).items()}, where)
    if "model" in found:
        model = found["model"]
        found["model"] = (
            [called.get(str(item), item) for item in model]
            if isinstance(model, list)
            else called.get(str(model), model)
        )
    return found


def _engine_keys(value: Values, where: str, more: Iterable[str] = ()) -> Values:
    """Plurals as what they stand for; unknown keys and keys given twice are refused."""
    known = [*KEYS, *PLURALS, *more]
    unknown = [key for key in value if key not in known]
    if unknown:
        named = "; ".join(_with_nearest(key, known) for key in unknown)
        raise _unusable(f"{where}: unknown keys {named}", hint=f"known keys: {', '.join(sorted(known))}")
    found: Values = {}
    for key, item in value.items():
        name = PLURALS.get(key, key)
        if name in found:
            raise _unusable(f"{where}: {name} is given twice, in the singular and in the plural")
        found[name] = item
    return found


def _with_nearest(key: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(key, list(known), n=1)
    return f"{key!r} (did you mean {near[0]!r}?)" if near else repr(key)


def _axis(key: str, value: Any, path: Path) -> list[Any]:
    values = value if isinstance(value, list) else [value]
    if not values:
        raise _unusable(f"{path}: axis {key} has no value", hint="leave it out, or give at least one")
    twice = [item for index, item in enumerate(values) if item in values[:index]]
    if twice:
        raise _unusable(f"{path}: axis {key} has {twice[0]!r} twice")
    return values


def _refuse_incomplete(sweep: Sweep, path: Path) -> None:
    if not sweep.axes and not sweep.include:
        raise _unusable(f"{path} has no cells", hint="give axes, such as models and formats, or include")
    grid = [sweep.axes] if sweep.axes else []
    if any("model" not in {**sweep.base, **values} for values in [*grid, *sweep.include]):
        raise _unusable(f"{path} does not say which models", hint="models: [DIR-or-hub-id, ...]")


def _plain(key: Any) -> str:
    return str(key).replace("-", "_")


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise _unusable(f"{where} holds {type(value).__name__}, expected a mapping")
    return value


def _unusable(message: str, hint: str = "`toolchain sweep --help` shows an example") -> UsageError:
    return UsageError(message, hint=hint, code="TC-007")
