"""What one token stands for, alone: its bytes, and the text that they are."""

from __future__ import annotations

import functools
import re
from typing import Any

from toolchain.runtime.encode import is_byte_level

BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
"""How vocabularies with byte fallback (SentencePiece) name single bytes."""


@functools.cache
def byte_of_character() -> dict[str, int]:
    """The alphabet of byte-level BPE (GPT-2): printable Latin-1 bytes are themselves, the others follow from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + index): byte for index, byte in enumerate(others)
    }


class TokenText:
    """``text(id)`` and ``utf8(id)`` of a tokenizer's tokens. Decoding a token alone would lose its leading space."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._byte_level = is_byte_level(tokenizer)
        self._known: dict[int, tuple[str, list[int]]] = {}

    def text(self, token_id: int) -> str:
        """The token as text; bytes that are no UTF-8 alone are U+FFFD."""
        return self._look_up(token_id)[0]

    def utf8(self, token_id: int) -> list[int]:
        """Its bytes: those of neighbouring tokens, joined, are UTF-8 text."""
        return self._look_up(token_id)[1]

    def _look_up(self, token_id: int) -> tuple[str, list[int]]:
        found = self._known.get(token_id)
        if found is None:
            # Ids beyond the vocabulary (rows that pad the embedding) are nothing.
            piece = self._tokenizer.convert_ids_to_tokens(token_id) or ""
            data = self._bytes_of(piece)
            found = self._known[token_id] = (data.decode("utf-8", errors="replace"), list(data))
        return found

    def _bytes_of(self, piece: str) -> bytes:
        if self._byte_level:
            table = byte_of_character()
            if all(character in table for character in piece):
                return bytes(table[character] for character in piece)
            return piece.encode("utf-8")
        byte = BYTE_PIECE.fullmatch(piece)
        if byte:
            return bytes([int(byte[1], 16)])
        return piece.replace("▁", " ").encode("utf-8")
