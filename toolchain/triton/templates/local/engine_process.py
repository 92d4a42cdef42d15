"""The engine process of target local: started, spoken to in JSON lines over its stdin and stdout, watched,
restarted.

It runs in an environment of its own (PyTorch and numpy 2), which the stub's Python cannot import, and a crash
of the engine does not take the stub with it: Triton never restarts a stub that died.
"""

import collections
import contextlib
import json
import os
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
        lines = _LineReader(process.stdout)
        try:
            message = lines.get(time.monotonic() + self._ready_timeout_s)
        except TimeoutError:
            _kill(process)
            raise EngineFailed(f"not ready within {self._ready_timeout_s:.0f} s") from None
        if message is None or message.get("op") != "ready":
            _kill(process)
            told = message.get("message", "") if message else f"it ended with status {process.returncode}"
            raise EngineFailed(f"{told}\n{stderr.tail()}".strip())
        with self._lock:
            self._process = process
            self.ready = message
            self._down_reason = ""
            if self._stopping:
                _kill(process)
                return
        threading.Thread(target=self._read, args=(process, lines, stderr), daemon=True).start()

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
                encoding="utf-8",
                errors="replace",
                **own_group,
            )
        except OSError as error:
            raise EngineFailed(f"cannot start {self._command[0]}: {error}") from error
        return process, _StderrTail(process.stderr)

    def send(self, message):
        """Write one message. Raises EngineFailed when the process is not there to read it."""
        line = json.dumps(message) + "\n"
        with self._lock:
            if self._process is None:
                raise EngineFailed(self._down_reason)
            try:
                self._process.stdin.write(line)
                self._process.stdin.flush()
            except (OSError, ValueError) as error:
                raise EngineFailed(f"the engine process is gone: {error}") from error

    def _read(self, process, lines, stderr):
        while (message := lines.get(None)) is not None:
            self._on_message(message)
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
            process.stdin.write(json.dumps({"op": "shutdown"}) + "\n")
            process.stdin.close()
        try:
            process.wait(STOP_GRACE_S)
        except subprocess.TimeoutExpired:
            _kill(process)


def _kill(process):
    process.kill()
    process.wait()


class _LineReader:
    """Messages from a pipe, in a thread, so that waiting for the first one can be bounded."""

    def __init__(self, pipe):
        self._pipe = pipe
        self._messages = collections.deque()
        self._condition = threading.Condition()
        self._ended = False
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self):
        for line in self._pipe:
            try:
                message = json.loads(line)
            except json.JSONDecodeError:
                # Something in the engine's environment printed to stdout; that is no reason to stop serving.
                print(f"[engine stdout] {line}", file=sys.stderr, end="", flush=True)
                continue
            with self._condition:
                self._messages.append(message)
                self._condition.notify()
        with self._condition:
            self._ended = True
            self._condition.notify()

    def get(self, deadline):
        """The next message, None at the end of the pipe. TimeoutError at ``deadline`` (time.monotonic, or
        None)."""
        with self._condition:
            while not self._messages:
                if self._ended:
                    return None
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    raise TimeoutError
                self._condition.wait(left)
            return self._messages.popleft()


class _StderrTail:
    """Passes the engine's stderr on to the server's log and keeps the last lines for error messages."""

    def __init__(self, pipe):
        self._lines = collections.deque(maxlen=STDERR_LINES)
        self._thread = threading.Thread(target=self._run, args=(pipe,), daemon=True)
        self._thread.start()

    def _run(self, pipe):
        for line in pipe:
            self._lines.append(line)
            print(f"[engine] {line}", file=sys.stderr, end="", flush=True)

    def tail(self):
        self._thread.join(timeout=1.0)
        return "".join(self._lines).strip()
