"""Records that are token ids already: ``input_ids``, and the tokenizer that they claim to come from."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from toolchain.core.errors import UsageError
from toolchain.core.files import sha256_file
from toolchain.data.texts import Sample, bad_record, sample_of

IDS_KEY = "input_ids"
TOKENIZER_KEY = "tokenizer_sha256"
"""Optional in each record: SHA-256 of the tokenizer.json that made its ids, in hexadecimal."""


@dataclass(frozen=True, kw_only=True)
class TokenIds:
    """One document as ids."""

    ids: np.ndarray = field(repr=False)
    """[tokens] int64."""
    tokenizer_sha256: str
    """What the record says of its tokenizer; empty: nothing."""
    where: str


def sample_or_ids(value: Any, where: str) -> Sample | TokenIds | None:
    """A record as ``texts.sample_of`` reads it, or its token ids; None for an empty list of them.

    ToolchainError TC-521 names ``where`` a record stands that is neither.
    """
    ids = value.get(IDS_KEY) if isinstance(value, dict) else None
    if ids is None:
        return sample_of(value, where)
    if not isinstance(ids, list) or any(type(item) is not int or not 0 <= item < 2**31 for item in ids):
        raise bad_record(where, f"{IDS_KEY} must be a list of token ids, whole numbers from 0")
    claimed = value.get(TOKENIZER_KEY, "")
    if not isinstance(claimed, str):
        raise bad_record(where, f"{TOKENIZER_KEY} must be the SHA-256 of a tokenizer.json")
    return TokenIds(ids=np.array(ids, dtype=np.int64), tokenizer_sha256=claimed, where=where) if ids else None


def tokenizer_hash(directory: Path) -> str | None:
    """SHA-256 of tokenizer.json in ``directory``; None where the tokenizer has another form."""
    path = directory / "tokenizer.json"
    return sha256_file(path) if path.is_file() else None


def require_same_tokenizer(record: TokenIds, known: str | None, directory: Path) -> None:
    """UsageError TC-193 when ``record`` says that another tokenizer made it."""
    if record.tokenizer_sha256 and known and record.tokenizer_sha256.lower() != known:
        raise UsageError(
            f"{record.where}: made with the tokenizer {record.tokenizer_sha256[:12]}..., the model's tokenizer.json is "
            f"{known[:12]}...: the same ids mean other text",
            hint=f"give the text itself, or ids of the tokenizer in {directory}",
            code="TC-193",
        )
