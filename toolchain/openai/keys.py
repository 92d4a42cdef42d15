"""API keys: read from a file, compared in constant time, never printed."""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from pathlib import Path

from toolchain.core.errors import UsageError
from toolchain.openai.settings import LOOPBACK

MIN_KEY_LENGTH = 8


def read_api_keys(path: Path) -> tuple[str, ...]:
    """The keys of ``path``, one per line; blank lines and lines that begin with ``#`` are left out.

    Raises UsageError TC-642 for a file that cannot be read, that holds no key, or a key that is too short or no
    printable ASCII. The message never holds a key.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"no API keys can be read from {path}: {error}", code="TC-642") from error
    numbered = [(number, line.strip()) for number, line in enumerate(lines, start=1)]
    keys = [(number, key) for number, key in numbered if key and not key.startswith("#")]
    for number, key in keys:
        if len(key) < MIN_KEY_LENGTH or not (key.isascii() and key.isprintable()) or " " in key:
            raise UsageError(
                f"{path} line {number} is no API key: expected at least {MIN_KEY_LENGTH} printable ASCII characters "
                "without spaces",
                hint="`openssl rand -hex 32` makes one",
                code="TC-642",
            )
    if not keys:
        raise UsageError(f"{path} holds no API key", hint="write one key per line", code="TC-642")
    return tuple(dict.fromkeys(key for _, key in keys))


def refuse_exposed(host: str, api_keys: Sequence[str], *, without_key: bool) -> None:
    """UsageError TC-643 for an address that others can reach, without a key."""
    if host in LOOPBACK or api_keys or without_key:
        return
    raise UsageError(
        f"the OpenAI endpoint would be open to everyone who reaches {host}",
        hint="give API keys (--api-key-file FILE), or stay on 127.0.0.1",
        code="TC-643",
    )


def matches(authorization: str, api_keys: Sequence[str]) -> bool:
    """Whether an Authorization header names one of ``api_keys``; every key is compared, in constant time."""
    scheme, _, given = authorization.partition(" ")
    if scheme.lower() != "bearer":
        return False
    token = given.strip().encode("utf-8", errors="surrogateescape")
    found = False
    for key in api_keys:
        found |= hmac.compare_digest(token, key.encode())
    return found
