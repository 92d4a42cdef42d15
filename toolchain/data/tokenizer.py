"""The tokenizer of a model or checkpoint directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from toolchain.core.errors import UsageError


def load_tokenizer(directory: Path) -> Any:
    """The transformers tokenizer beside ``directory``/config.json; remote code stays off. UsageError TC-207.

    transformers 5 makes an empty tokenizer of the model type where there is none: it turns every text into nothing.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        empty = not tokenizer("a", add_special_tokens=False)["input_ids"]
    except Exception as error:
        # The Rust side raises bare Exceptions for files that it cannot parse.
        raise _unusable(directory, " ".join(str(error).split())[:300]) from error
    if empty:
        raise _unusable(directory, "its vocabulary is empty")
    return tokenizer


def _unusable(directory: Path, reason: str) -> UsageError:
    return UsageError(
        f"no usable tokenizer in {directory}: {reason}",
        hint="put tokenizer.json and tokenizer_config.json of the source model there",
        code="TC-207",
    )
