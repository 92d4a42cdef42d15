"""Server-sent events out of bytes as they come, as the HTML standard defines them."""

from __future__ import annotations


class EventParser:
    """Bytes in, the data of complete events out. Comments and fields other than ``data`` are passed over."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []
        self._after_return = False

    def feed(self, chunk: bytes) -> list[bytes]:
        """Data of the events that ``chunk`` completes. It may end anywhere: in a line, in a character."""
        if self._after_return and chunk.startswith(b"\n"):
            chunk = chunk[1:]  # the second half of CR LF
        self._after_return = chunk.endswith(b"\r") if chunk else self._after_return
        text = self._rest + chunk
        cut = max(text.rfind(b"\n"), text.rfind(b"\r")) + 1
        self._rest = text[cut:]
        found: list[bytes] = []
        for line in text[:cut].splitlines():
            if not line:
                found += self._dispatch()
            elif line.startswith(b"data"):
                name, _, value = line.partition(b":")
                if name == b"data":
                    self._data.append(value.removeprefix(b" "))
        return found

    def end(self) -> list[bytes]:
        """What a server that omits the last empty line has sent before it closed."""
        return [*(self.feed(b"\n") if self._rest else []), *self._dispatch()]

    def _dispatch(self) -> list[bytes]:
        found, self._data = ([b"\n".join(self._data)] if self._data else []), []
        return found
