"""The engine process of target local: started, spoken to in JSON lines over its stdin and stdout, watched,
restarted.

It runs in an environment of its own (PyTorch and numpy 2), which the stub's Python cannot import, and a crash
of the engine does not take the stub with it: Triton never restarts a stub that died.
"""

import collections
import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time

STDERR_LINES = 20
MAX_RESTARTS = 5
RESTART_WINDOW_S = 600.0
STOP_GRACE_S = 4.0


class EngineFailed(Exception):
    """The engine process did not become ready, or is gone."""


class EngineProcess:
    """``on_message(message)`` is called in a reader thread for every message after ``ready``;
    ``on_death(reason)`` once for each unexpected end, before a restart is tried."""

    def __init__(self, command, *, ready_timeout_s, on_message, on_death, log):
        self._command = command
        self._ready_timeout_s = ready_timeout_s
        self._on_message = on_message
        self._on_death = on_death
        self._log = log
        self._lock = threading.Lock()
        self._process = None
        self._stopping = False
        self._down_reason = "the engine process is starting"
        self._deaths = []
        self.ready = {}

    def start(self):
        """Start it and wait until it is ready. Raises EngineFailed with the end of its stderr."""
        process, stderr = self._spawn()
        reader = _Reader(process.stdout, self._on_message, lambda: self._ended(process, stderr), self._log)
        try:
            message = reader.first(self._ready_timeout_s)
        except TimeoutError:
            reader.go_on(False)
            _kill(process)
            raise EngineFailed(f"not ready within {self._ready_timeout_s:.0f} s") from None
        if message is None or message.get("op") != "ready":
            reader.go_on(False)
            _kill(process)
            told = message.get("message", "") if message else f"it ended with status {process.returncode}"
            raise EngineFailed(f"{told}\n{stderr.tail()}".strip())
        with self._lock:
            self._process = process
            self.ready = message
            self._down_reason = ""
            if self._stopping:
                reader.go_on(False)
                _kill(process)
                return
        reader.go_on(True)

    def _spawn(self):
        environment = {key: os.environ[key] for key in os.environ if key not in ("PYTHONHOME", "PYTHONPATH")}
        # A process group of its own: Ctrl-C in the server's terminal must not end requests that still drain.
        own_group = {"process_group": 0} if sys.version_info >= (3, 11) else {}
        try:
            process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=environment,
                **own_group,
            )
        except OSError as error:
            raise EngineFailed(f"cannot start {self._command[0]}: {error}") from error
        return process, _StderrTail(process.stderr)

    def send(self, message):
        """Write one message. Raises EngineFailed when the process is not there to read it."""
        line = json.dumps(message).encode("ascii") + b"\n"
        with self._lock:
            if self._process is None:
                raise EngineFailed(self._down_reason)
            try:
                self._process.stdin.write(line)
                self._process.stdin.flush()
            except (OSError, ValueError) as error:
                raise EngineFailed(f"the engine process is gone: {error}") from error

    def _ended(self, process, stderr):
        process.wait()
        with self._lock:
            self._process = None
            if self._stopping:
                return
            reason = f"the engine process ended with status {process.returncode}"
            self._down_reason = f"{reason} and is being restarted"
        self._log(f"{reason}\n{stderr.tail()}")
        self._on_death(reason)
        self._restart(reason)

    def _restart(self, reason):
        """Try again with growing pauses; give up after MAX_RESTARTS ends within RESTART_WINDOW_S."""
        while True:
            now = time.monotonic()
            self._deaths = [*(moment for moment in self._deaths if now - moment < RESTART_WINDOW_S), now]
            if len(self._deaths) > MAX_RESTARTS:
                with self._lock:
                    self._down_reason = f"{reason}; given up after {MAX_RESTARTS} restarts: reload the model"
                self._log(self._down_reason)
                return
            time.sleep(0.1 * 2 ** (len(self._deaths) - 1))
            if self._stopping:
                return
            try:
                self.start()
            except EngineFailed as error:
                reason = f"the engine process could not be restarted: {error}"
                self._log(reason)
            else:
                self._log("the engine process was restarted")
                return

    def stop(self):
        """Ask it to end, then make it end."""
        with self._lock:
            self._stopping = True
            self._down_reason = "the model is being unloaded"
            process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(OSError, ValueError):
            process.stdin.write(b'{"op": "shutdown"}\n')
            process.stdin.close()
        try:
            process.wait(STOP_GRACE_S)
        except subprocess.TimeoutExpired:
            _kill(process)


def _kill(process):
    process.kill()
    process.wait()


class _Reader:
    """Messages from a pipe, handed on in the thread that reads them: the first to whoever waits for it, the others,
    if the reader shall go on after that one, to ``on_message``, and the end of the pipe to ``on_end``."""

    def __init__(self, pipe, on_message, on_end, log):
        self._pipe = pipe
        self._on_message = on_message
        self._on_end = on_end
        self._log = log
        self._first = queue.SimpleQueue()
        self._verdict = queue.SimpleQueue()
        threading.Thread(target=self._run, daemon=True).start()

    def first(self, timeout_s):
        """The first message, None when the pipe ends before. TimeoutError."""
        try:
            return self._first.get(timeout=timeout_s)
        except queue.Empty:
            raise TimeoutError from None

    def go_on(self, wanted):
        """Hand on what follows the first message; or nothing more, also not the end."""
        self._verdict.put(wanted)

    def _run(self):
        messages = self._messages()
        self._first.put(next(messages, None))
        if not self._verdict.get():
            return
        for message in messages:
            try:
                self._on_message(message)
            except Exception as error:  # noqa: BLE001 - the answers of all other requests come through here
                self._log(f"a message of the engine process could not be handled: {error!r}")
        self._on_end()

    def _messages(self):
        for line in self._pipe:
            try:
                yield json.loads(line)
            except ValueError:
                # Something in the engine's environment printed to stdout; that is no reason to stop serving.
                text = line.decode("utf-8", errors="replace")
                print(f"[engine stdout] {text}", file=sys.stderr, end="", flush=True)


class _StderrTail:
    """Passes the engine's stderr on to the server's log and keeps the last lines for error messages."""

    def __init__(self, pipe):
        self._lines = collections.deque(maxlen=STDERR_LINES)
        self._thread = threading.Thread(target=self._run, args=(pipe,), daemon=True)
        self._thread.start()

    def _run(self, pipe):
        for data in pipe:
            line = data.decode("utf-8", errors="replace")
            self._lines.append(line)
            print(f"[engine] {line}", file=sys.stderr, end="", flush=True)

    def tail(self):
        self._thread.join(timeout=1.0)
        return "".join(self._lines).strip()
