"""What goes wrong in the engine reaches the request that it concerns, and no other."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from toolchain.core.errors import ToolchainError, UsageError
from toolchain.runtime.engine import LocalEngine
from toolchain.runtime.types import Chunk, SamplingParams

Tiny = Callable[[str], Path]
SHORT = SamplingParams(max_tokens=4, ignore_eos=True)
LONG = SamplingParams(max_tokens=400, ignore_eos=True)


def quiet(chunk: Chunk) -> None:
    return None


@pytest.fixture(scope="module")
def engine(tiny: Tiny) -> Iterator[LocalEngine]:
    with LocalEngine.load(tiny("llama"), device="cpu", max_batch_size=2) as made:
        yield made


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("", "empty"),
        ([], "empty"),
        ("x" * 512, "max_seq_len is 512"),
        ([5, 320], "not in 0..319"),
        ([-1], "not in 0"),
    ],
)
def test_a_bad_prompt_is_refused(engine: LocalEngine, prompt: str | list[int], said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        engine.generate(prompt, SHORT)
    assert caught.value.code == "TC-503"


def test_the_longest_prompt_that_fits_gets_one_token(engine: LocalEngine) -> None:
    completion = engine.generate("x" * 511, SamplingParams(ignore_eos=True))
    assert (len(completion.token_ids), completion.finish_reason) == (1, "length")


def test_cancel_keeps_the_answer_so_far(engine: LocalEngine) -> None:
    some = threading.Event()
    handle = engine.submit("abc", LONG, lambda chunk: some.set())
    some.wait(30)
    handle.cancel()
    completion = handle.result(30)
    assert completion.finish_reason == "cancelled"
    assert 0 < len(completion.token_ids) < 400


def test_a_waiting_request_can_be_cancelled(engine: LocalEngine) -> None:
    running = [engine.submit("abc", LONG, quiet) for _ in range(2)]
    waiting = engine.submit("abc", LONG, quiet)
    waiting.cancel()
    completion = waiting.result(30)
    assert (completion.finish_reason, completion.token_ids) == ("cancelled", ())
    assert not all(handle.done for handle in running)
    for handle in running:
        handle.cancel()


def test_leaving_a_stream_early_frees_its_row(engine: LocalEngine) -> None:
    stream = engine.stream("abc", LONG)
    next(stream)
    stream.close()
    assert len(engine.generate("abc", SHORT).token_ids) == 4


def test_a_failing_receiver_ends_only_its_own_request(engine: LocalEngine) -> None:
    def failing(chunk: Chunk) -> None:
        raise RuntimeError("the pipe is gone")

    expected = engine.generate("abc", SHORT)
    bad = engine.submit("abc", SHORT, failing)
    good = engine.submit("abc", SHORT, quiet)
    with pytest.raises(ToolchainError, match="the pipe is gone") as caught:
        bad.result(30)
    assert caught.value.code == "TC-508"
    assert good.result(30) == expected


def test_a_failing_model_fails_its_requests_and_the_engine_goes_on(
    engine: LocalEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = engine.generate("abc", SHORT)
    errors: list[ToolchainError] = []
    real = engine.model.lm_head.forward
    calls = 0

    def fails_in_the_third_step(*arguments: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise RuntimeError("out of memory")
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(engine.model.lm_head, "forward", fails_in_the_third_step)
        handle = engine.submit("abc", LONG, quiet, on_error=errors.append)
        with pytest.raises(ToolchainError, match="out of memory") as caught:
            handle.result(30)
    assert caught.value.code == "TC-504"
    assert errors == [caught.value]
    assert engine.generate("abc", SHORT) == expected


def test_one_prompt_that_the_model_cannot_take_does_not_fail_its_neighbour(
    engine: LocalEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = engine.generate("abc", SHORT)
    real = engine.model.model.embed_tokens.forward
    poison = engine.encode("!")[0]

    def refuses_poison(ids: object) -> object:
        if (ids == poison).any():  # type: ignore[attr-defined]
            raise RuntimeError("poison")
        return real(ids)

    blocker = threading.Event()
    with monkeypatch.context() as patch:
        patch.setattr(engine.model.model.embed_tokens, "forward", refuses_poison)
        # Hold the model thread so that both prompts are waiting when it looks: they are prefilled together.
        holder = threading.Thread(target=lambda: engine._scheduler.call(lambda: blocker.wait(30)))
        holder.start()
        bad = engine.submit("a!c", SHORT, quiet)
        good = engine.submit("abc", SHORT, quiet)
        blocker.set()
        holder.join()
        with pytest.raises(ToolchainError, match="poison"):
            bad.result(30)
        assert good.result(30) == expected


def test_closing_fails_what_is_unfinished(tiny: Tiny) -> None:
    engine = LocalEngine.load(tiny("llama"), device="cpu", max_batch_size=1)
    handles = [engine.submit("abc", LONG, quiet) for _ in range(3)]
    engine.close()
    for handle in handles:
        with pytest.raises(ToolchainError, match="closed"):
            handle.result(30)
    with pytest.raises(ToolchainError, match="closed"):
        engine.submit("abc", SHORT, quiet)
    engine.close()


def test_limits_come_from_the_engine_and_can_only_be_lowered(tiny: Tiny, tmp_path: Path) -> None:
    directory = tmp_path / "engine"
    shutil.copytree(tiny("llama"), directory / "checkpoint")
    with pytest.raises(ToolchainError, match="not finished"):
        LocalEngine.load(directory, device="cpu")
    manifest = {"name": "small", "limits": {"max_batch_size": 2, "max_seq_len": 64}}
    (directory / "engine.json").write_text(json.dumps(manifest))
    with LocalEngine.load(directory, device="cpu") as engine:
        assert (engine.name, engine.limits.max_batch_size, engine.limits.max_seq_len) == ("small", 2, 64)
    with LocalEngine.load(directory, device="cpu", max_batch_size=1, max_seq_len=32) as engine:
        assert (engine.limits.max_batch_size, engine.limits.max_seq_len) == (1, 32)
    with pytest.raises(UsageError, match="max_batch_size 3 exceeds 2"):
        LocalEngine.load(directory, device="cpu", max_batch_size=3)


def test_paths_and_devices_that_are_not_there(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not a directory"):
        LocalEngine.load(tmp_path / "absent")
    with pytest.raises(UsageError, match=r"neither engine\.json nor config\.json"):
        LocalEngine.load(tmp_path)
    with pytest.raises(UsageError, match="unknown device"):
        LocalEngine.load(tiny("llama"), device="quantum")
    with pytest.raises(UsageError, match="CUDA devices"):
        LocalEngine.load(tiny("llama"), device="cuda:99")
