"""One model of a repository as the lint reads it: its config.pbtxt, its version directories, its backend."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolchain.core.findings import Finding
from toolchain.triton.rules.places import Node, Word, read_places, words
from toolchain.triton.rules.rule import Rule

CONFIG = "config.pbtxt"
MAX_CONFIG_BYTES = 16 * 2**20
"""Real ones have kilobytes; a file of this size is something else under that name."""
PARSE = Rule(
    code="TC-601",
    says="config.pbtxt is no text-format `ModelConfig` (unknown field, bad word, a scalar given twice)",
    server="refuses",
    hint="see Triton's model configuration",
)
UNREADABLE = Rule(
    code="TC-650",
    says="a file or directory cannot be read, is a dangling link or of an impossible size",
    server="refuses to start; ends with SIGABRT where config.pbtxt is a directory",
    hint="remove it, or make it readable",
)
ENCODING = Rule(
    code="TC-601",
    severity="warning",
    says="config.pbtxt is not UTF-8",
    server="accepts it, but its JSON answers about the model are then invalid",
    hint="save it as UTF-8",
)


@dataclass(frozen=True, kw_only=True)
class Model:
    directory: Path
    file: str
    """config.pbtxt (or configs/NAME.pbtxt) as findings name it, relative to the repository."""
    config: Any
    """``inference.ModelConfig``, empty where the model has no config.pbtxt."""
    has_config: bool
    text: str
    tokens: list[Word]
    places: Node

    @property
    def name(self) -> str:
        return self.directory.name

    def where(self, *path: str | int) -> str:
        """file:line:column of a field; the file alone where there is no such field."""
        node = self.places.find(*path)
        return self.file if node is self.places else f"{self.file}:{node.place}"

    def at_entry(self, name: str, key: str) -> str:
        """file:line:column of the entry ``key`` of map field ``name``."""
        node = self.places.entry(name, key)
        return self.file if node is self.places else f"{self.file}:{node.place}"

    def beside(self, name: str) -> str:
        """A path below the model's directory as findings name it."""
        return f"{self.name}/{name}"

    def has(self, field: str) -> bool:
        """Whether the text sets a field, also to its default."""
        return field in self.places.fields

    def parameter(self, key: str) -> str:
        """A parameter's string, empty where it is not given."""
        return str(self.config.parameters[key].string_value) if key in self.config.parameters else ""


def read_model(directory: Path) -> tuple[Model | None, list[Finding]]:
    """The model in ``directory`` and what stands against reading it; None where config.pbtxt cannot be used."""
    return read_config(directory, directory / CONFIG)


def read_config(directory: Path, path: Path) -> tuple[Model | None, list[Finding]]:
    """The model of ``directory`` by the configuration in ``path``."""
    from tritonclient.grpc import model_config_pb2

    file = f"{directory.name}/{path.relative_to(directory)}"
    if not path.exists() and not path.is_symlink():
        return _model(directory, file, "", model_config_pb2.ModelConfig(), has_config=False), []
    raw, problem = read_bytes(path, file, limit=MAX_CONFIG_BYTES)
    if problem is not None:
        return None, [problem]
    text = raw.decode("utf-8", errors="replace")
    config, findings = _parse(text, file)
    if config is None:
        return None, findings
    if "�" in text and "�".encode() not in raw:
        findings.append(ENCODING.found(file, "bytes that are no UTF-8"))
    return _model(directory, file, text, config, has_config=True), findings


def read_bytes(path: Path, file: str, *, limit: int) -> tuple[bytes, Finding | None]:
    """The bytes of a regular file, or the finding that says why not. ``file``: how to name it."""
    try:
        if not path.is_file():
            kind = "a directory" if path.is_dir() else "no regular file"
            what = "a link to nothing" if path.is_symlink() and not path.exists() else kind
            return b"", UNREADABLE.found(file, f"{what}, expected a file")
        if path.stat().st_size > limit:
            size = path.stat().st_size
            return b"", UNREADABLE.found(file, f"has {size} bytes, expected at most {limit}")
        return path.read_bytes(), None
    except OSError as error:
        return b"", UNREADABLE.found(file, f"cannot be read: {error.strerror or error}")


def _model(directory: Path, file: str, text: str, config: Any, *, has_config: bool) -> Model:
    tokens = words(text)
    return Model(
        directory=directory,
        file=file,
        config=config,
        has_config=has_config,
        text=text,
        tokens=tokens,
        places=read_places(tokens),
    )


def _parse(text: str, file: str) -> tuple[Any, list[Finding]]:
    """The ModelConfig, or the finding that says at which line and column it stops being one."""
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    try:
        return text_format.Parse(text, model_config_pb2.ModelConfig()), list(placeholders(text, file))
    except text_format.ParseError as error:
        place = ":".join(str(number) for number in (error.GetLine(), error.GetColumn()) if number is not None)
        message = re.sub(r"^\d+:\d+\s*:\s*", "", str(error))
        said = "".join(sign if sign.isprintable() else "�" for sign in message[:MESSAGE_LENGTH])
        bom = "it begins with a byte order mark: save it without" if text.startswith("\ufeff") else ""
        found = PARSE.found(f"{file}:{place}" if place else file, said, bom)
        return None, [*placeholders(text, file), found]
    except (RecursionError, ValueError) as error:
        return None, [PARSE.found(file, f"{type(error).__name__}: {str(error)[:MESSAGE_LENGTH]}")]


MESSAGE_LENGTH = 300
PLACEHOLDER = re.compile(r"\$\{[^}\n]*\}")
UNFILLED = Rule(
    code="TC-603",
    says="a `${...}` of a template was left unfilled",
    server="loads it with that text as value; refuses where a number is expected",
    hint="fill it, or remove the parameter",
)
UNFILLED_OPTIONAL = Rule(
    code="TC-603",
    severity="warning",
    says="a `${...}` is left in an optional parameter of NVIDIA's `inflight_batcher_llm` template",
    server="loads it; the template's model.py and backend take some of them for not given",
    hint="remove the parameter where it is not needed",
)
TEMPLATE_MODELS = ("preprocessing", "postprocessing", "tensorrt_llm", "tensorrt_llm_bls", "ensemble")
KEY = re.compile(r'\bkey\s*:\s*"([^"\n]*)"')
NEEDED = ("gpt_model_type", "gpt_model_path", "tokenizer_dir")


def placeholders(text: str, file: str) -> Iterator[Finding]:
    """Each ``${...}`` outside of comments."""
    template = file.split("/", 1)[0] in TEMPLATE_MODELS
    start = 0
    for number, line in enumerate(text.split("\n"), start=1):
        for match in PLACEHOLDER.finditer(line[: _comment_column(line)]):
            keys = KEY.findall(text, 0, start + match.start())
            name = match.group()[2:-1]
            optional = template and keys and keys[-1] == name and name not in NEEDED
            rule = UNFILLED_OPTIONAL if optional else UNFILLED
            yield rule.found(f"{file}:{number}:{match.start() + 1}", f"unfilled placeholder {match.group()}")
        start += len(line) + 1


def _comment_column(line: str) -> int:
    """Where the comment of a line begins; its length where it has none."""
    return next(
        (match.start() for match in re.finditer(r'"(?:\\.|[^"\\])*"|#', line) if match.group() == "#"),
        len(line),
    )
