"""Record ``LlmArgs`` of a release from its own source: reads ``tensorrt_llm/llmapi/llm_args.py`` and imports nothing.

python -m toolchain.build.llmapi.extract llm_args.py 1.2.1 "NVIDIA/TensorRT-LLM v1.2.1" > data/args_1.2.1.yaml
"""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from toolchain.build.llmapi.annotations import Names, default_text, type_text
from toolchain.build.llmapi.records import ROOT

STRICT = ("BaseModel", "StrictBaseModel")


@dataclass(kw_only=True)
class _Module:
    models: dict[str, ast.ClassDef] = field(default_factory=dict)
    names: Names = field(default_factory=Names)


def extract(source: str, *, release: str, origin: str) -> dict[str, Any]:
    """The record of ``source``, as ``data/args_*.yaml`` have it. SyntaxError when it is no Python."""
    module = _read(ast.parse(source))
    wanted, found = [ROOT], {}
    while wanted:
        name = wanted.pop(0)
        node = module.models.get(name)
        if node is None or name in found:
            continue
        keys = dict(_fields(node, module.names))
        found[name] = keys
        wanted += [*_bases(node), *sorted(_mentioned(keys, module))]
    unions = {name: _union(module, name) for name in module.names.unions if _is_used(name, found)}
    return {
        "since": release,
        "releases": [release],
        "read_from": release,
        "source": origin,
        "unions": unions,
        "classes": {_head(module, name): keys for name, keys in found.items()},
    }


def _read(tree: ast.Module) -> _Module:
    module = _Module()
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            bases = [ast.unparse(base) for base in node.bases]
            if any(base in STRICT or base in module.models for base in bases):
                module.models[node.name] = node
                module.names.classes.add(node.name)
            elif any("Enum" in base for base in bases):
                module.names.words[node.name] = _members(node)
        elif isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            if isinstance(target, ast.Name):
                _alias(module, target.id, node.value)
    return module


def _alias(module: _Module, name: str, value: ast.expr) -> None:
    """``X = Literal[...]``, ``X: TypeAlias = Union[...]``, with a discriminator or without."""
    text = ast.unparse(value)
    if text.startswith("Literal["):
        module.names.aliases[name] = value
    elif "Union[" in text:
        members = [
            node.id for node in ast.walk(value) if isinstance(node, ast.Name) and node.id in module.models
        ]
        tags = [
            node.value
            for node in ast.walk(value)
            if isinstance(node, ast.keyword) and node.arg == "discriminator"
        ]
        if members:
            tag = ast.literal_eval(tags[0]) if tags else ""
            module.names.unions[name] = (tag, members)


def _members(node: ast.ClassDef) -> list[str]:
    """Words of an enum: the values of a StrEnum, else the names, which the validators take in any case."""
    pairs = [
        (item.targets[0].id, item.value.value)
        for item in node.body
        if isinstance(item, ast.Assign)
        and isinstance(item.targets[0], ast.Name)
        and isinstance(item.value, ast.Constant)
    ]
    if all(isinstance(value, str) for _, value in pairs):
        return [str(value) for _, value in pairs]
    return [name for name, _ in pairs] + [name.lower() for name, _ in pairs]


def _bases(node: ast.ClassDef) -> list[str]:
    return [ast.unparse(base) for base in node.bases if ast.unparse(base) not in STRICT]


def _head(module: _Module, name: str) -> str:
    bases = [base for base in _bases(module.models[name]) if base in module.models]
    return f"{name}({bases[0]})" if bases else name


def _fields(node: ast.ClassDef, names: Names) -> Iterator[tuple[str, str]]:
    for item in node.body:
        if not isinstance(item, ast.AnnAssign) or not isinstance(item.target, ast.Name):
            continue
        key, annotation = item.target.id, ast.unparse(item.annotation)
        if key.startswith("_") or key == "model_config" or annotation.startswith("ClassVar"):
            continue
        options = _options(item.value)
        kind = type_text(item.annotation, names, options)
        default = default_text(item.value, options)
        text = f"{kind} = {default}" if default is not None else kind
        aliases = [
            ast.literal_eval(argument)
            for argument in getattr(options.get("validation_alias"), "args", ())
            if isinstance(argument, ast.Constant)
        ]
        yield from ((name, text) for name in aliases or [key])


def _options(value: ast.expr | None) -> dict[str, ast.expr]:
    """Keyword arguments of ``Field(...)``; its first argument is the default."""
    if not (isinstance(value, ast.Call) and ast.unparse(value.func) in ("Field", "PydanticField")):
        return {}
    options = {item.arg: item.value for item in value.keywords if item.arg}
    return {**({"default": value.args[0]} if value.args else {}), **options}


def _mentioned(keys: dict[str, str], module: _Module) -> set[str]:
    """Classes that the fields are made of."""
    text = " ".join(kind.split(" = ")[0] for kind in keys.values())
    for name, (_, members) in module.names.unions.items():
        text += f" {' '.join(members)}" if name in text else ""
    return {
        name
        for name in module.models
        if name in text.replace("[", " ").replace("]", " ").replace("?", " ").split()
    }


def _is_used(name: str, found: dict[str, dict[str, str]]) -> bool:
    return any(name in kind.split(" = ")[0] for keys in found.values() for kind in keys.values())


def _union(module: _Module, name: str) -> dict[str, Any]:
    tag, members = module.names.unions[name]
    tag = tag or next((key for member in members for key in _constants(module.models[member])), "")
    classes = {_constants(module.models[member]).get(tag, member): member for member in members}
    return {"by": tag, "classes": _dispatch(module, members) or classes}


def _constants(node: ast.ClassDef) -> dict[str, str]:
    """Fields with one possible value: ``x: Literal["a"] = "a"`` or ``x: ClassVar[str] = "a"``."""
    found = {}
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and item.value is not None:
            value = _options(item.value).get("default", item.value)
            single = ast.unparse(item.annotation).startswith(("ClassVar", "Literal"))
            if single and isinstance(value, ast.Constant) and isinstance(value.value, str):
                found[item.target.id] = value.value
    return found


def _dispatch(module: _Module, members: list[str]) -> dict[str, str]:
    """Until 1.2 a ``from_dict`` of the base chooses the class by a mapping: its words are the ones that count."""
    for base in {base for member in members for base in _bases(module.models[member])}:
        for node in ast.walk(module.models.get(base, ast.Module(body=[], type_ignores=[]))):
            if (
                isinstance(node, ast.Dict)
                and node.values
                and all(isinstance(value, ast.Name) and value.id in module.models for value in node.values)
            ):
                pairs = zip(node.keys, node.values, strict=True)
                return {
                    str(ast.literal_eval(key)): ast.unparse(value) for key, value in pairs if key is not None
                }
    return {}


def main(words: list[str]) -> str:
    """The YAML document for ``FILE RELEASE ORIGIN``."""
    import yaml

    path, release, origin = words
    found = extract(Path(path).read_text(encoding="utf-8"), release=release, origin=origin)
    return yaml.safe_dump(json.loads(json.dumps(found)), sort_keys=False, width=120)


if __name__ == "__main__":
    sys.stdout.write(main(sys.argv[1:]))
