"""Log probabilities of the model in the two shapes of OpenAI's API."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def chat_logprobs(tokens: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """``logprobs`` of a chat's choice. ``tokens``: as the contract of the model describes them."""
    content = [{**_named(token), "top_logprobs": [_named(top) for top in token["top"]]} for token in tokens]
    return {"content": content, "refusal": None}


def _named(token: dict[str, Any]) -> dict[str, Any]:
    return {"token": token["token"], "logprob": _finite(token["logprob"]), "bytes": token["bytes"]}


def _finite(logprob: float) -> float:
    """JSON has no infinity; OpenAI's documentation gives -9999.0 for what is impossible."""
    return max(logprob, -9999.0)


class CompletionLogprobs:
    """``logprobs`` of a completion's choice, piece by piece: offsets count the characters of the text so far."""

    def __init__(self) -> None:
        self._offset = 0

    def shape(self, tokens: Iterable[dict[str, Any]]) -> dict[str, Any]:
        names, values, tops, offsets = [], [], [], []
        for token in tokens:
            names.append(token["token"])
            values.append(_finite(token["logprob"]))
            # OpenAI: the chosen token is always there, so there may be one more than asked for.
            chosen = {token["token"]: _finite(token["logprob"])}
            tops.append({**{top["token"]: _finite(top["logprob"]) for top in token["top"]}, **chosen})
            offsets.append(self._offset)
            self._offset += _characters(token)
        return {"tokens": names, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}


def _characters(token: dict[str, Any]) -> int:
    """Characters that begin in this token: a character of several tokens counts where it begins."""
    if token["bytes"] is None:
        return 0
    return sum((byte & 0xC0) != 0x80 for byte in token["bytes"])
