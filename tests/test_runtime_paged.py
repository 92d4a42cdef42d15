"""Decoding over pages, with the kernels in Triton's interpreter: the tokens of transformers' own generation.

CUDA graphs need a GPU (``make gpu-check``); everything else is what runs there.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.planning import plan_for
from toolchain.core.errors import ToolchainError, UsageError
from toolchain.data.tokenizer import load_tokenizer
from toolchain.kernels.decoding import PAGE
from toolchain.modeling.loading import load_source
from toolchain.modeling.packed import load_packed
from toolchain.modeling.packed.loading import packed_bytes
from toolchain.plan.types import Serving
from toolchain.quantize.job import quantize
from toolchain.runtime.engine import LocalEngine
from toolchain.runtime.location import Limits
from toolchain.runtime.model import Runner
from toolchain.runtime.paged.decoder import Decoder, sizes_up_to
from toolchain.runtime.paged.pool import PagePool
from toolchain.runtime.paged.setup import Paging
from toolchain.runtime.types import SamplingParams
from toolchain.runtime.waiting import QueueLimits
from toolchain.runtime.ways import Way, Wish, choose_way

Tiny = Callable[[str], Path]
PROMPTS = (
    "def main():\n",
    "x",
    "The quick brown fox jumps over the lazy dog. " * 3,
    "y" * (PAGE - 4),
    "né 漢字 ",
)
PAGED = Way(packed=False, paged=True, kv_in_fp8=False)


def expected(engine: LocalEngine, prompt: str, count: int) -> list[int]:
    ids = engine.encode(prompt)
    output = engine.model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=count)
    return [int(token) for token in output[0, len(ids) :]]


def answers(engine: LocalEngine, count: int) -> list[list[int]]:
    params = SamplingParams(max_tokens=count)
    handles = [engine.submit(prompt, params, lambda chunk: None) for prompt in PROMPTS]
    return [list(handle.result().token_ids) for handle in handles]


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        *((kind, "paged") for kind in ("qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "llama")),
        ("qwen3_moe", "static"),
    ],
)
def test_a_crowd_gets_the_tokens_of_transformers(kind: str, layout: str, tiny: Tiny) -> None:
    """More prompts than rows, of unequal lengths: they join and leave; one crosses the end of a page."""
    with LocalEngine.load(
        tiny(kind),
        device="cpu",
        dtype=torch.float32,
        max_batch_size=3,
        max_seq_len=220,
        way=PAGED,
        wish=Wish(kv_layout=layout),
    ) as engine:
        assert engine.notes == ()
        assert answers(engine, 7) == [expected(engine, prompt, 7) for prompt in PROMPTS]


@pytest.mark.parametrize("format", ["nvfp4", "fp8"])
def test_packed_weights_and_an_fp8_cache(format: str, tiny: Tiny, tmp_path: Path) -> None:
    """What runs on a GPU, against the decoded model with the same roundings."""
    directory = tmp_path / "checkpoint"
    quantize(
        plan_for(tiny("qwen3_moe"), "w4a16_nvfp4" if format == "nvfp4" else format, kv_cache="fp8"), directory
    )
    prompt = PROMPTS[2]
    logprobs = []
    for way in (
        Way(packed=False, paged=False, kv_in_fp8=False),
        Way(packed=True, paged=True, kv_in_fp8=True),
    ):
        with LocalEngine.load(directory, device="cpu", dtype=torch.float32, way=way) as engine:
            params = SamplingParams(max_tokens=2, logprobs=0, ignore_eos=True)
            answer = engine.generate(prompt, params)
            logprobs.append([item.logprob for item in answer.logprobs])
    # The prompt itself is read with unrounded keys and values: only what is decoded sees the cache.
    first, second = (torch.tensor(items) for items in logprobs)
    assert (first - second).abs().max() < 0.05


def test_requests_wait_for_pages_and_all_are_answered(tiny: Tiny) -> None:
    """Memory for few requests at a time."""
    cpu = torch.device("cpu")
    plain = Way(packed=False, paged=False, kv_in_fp8=False)
    with LocalEngine.load(tiny("qwen3_moe"), device="cpu", dtype=torch.float32, way=plain) as whole:
        wanted = answers(whole, 8)
        model, tokenizer, ends = whole.model, whole.tokenizer, whole.end_ids
    page = 2 * 2 * 2 * 32 * 4 * PAGE  # layers x (keys, values) x heads x size x float32
    limits = Limits(max_batch_size=4, max_seq_len=220)
    paging = Paging(
        max_batch_size=4, max_seq_len=220, memory_bytes=page * (5 + 4)
    )  # and a prompt beside them
    model.set_attn_implementation("sdpa")  # as it was loaded
    with LocalEngine(model, tokenizer, device=cpu, limits=limits, paging=paging, end_ids=ends) as engine:
        pool = engine._scheduler._runner.paged.pool  # type: ignore[union-attr]
        assert pool.pages == 4
        assert answers(engine, 8) == wanted
        assert engine.load_now().running == 0
        deadline = time.monotonic() + 10  # they go back when the turn of the last token ends
        while pool.free < pool.pages and time.monotonic() < deadline:
            time.sleep(0.01)
        assert pool.free == pool.pages


def test_free_rows_without_pages_are_no_room(tiny: Tiny) -> None:
    """``max_waiting`` 0: nobody waits, for pages either."""
    cpu = torch.device("cpu")
    model = load_source(tiny("qwen3_moe"), device=cpu, dtype=torch.float32)
    page = 2 * 2 * 2 * 32 * 4 * PAGE
    limits = Limits(max_batch_size=8, max_seq_len=220)
    paging = Paging(max_batch_size=8, max_seq_len=220, memory_bytes=page * 9)  # pages of one request
    queue = QueueLimits(max_waiting=0)
    with LocalEngine(
        model, load_tokenizer(tiny("qwen3_moe")), device=cpu, limits=limits, paging=paging, queue=queue
    ) as engine:
        begun = threading.Event()
        params = SamplingParams(max_tokens=150, ignore_eos=True)
        first = engine.submit("x" * 60, params, lambda chunk: begun.set())
        assert begun.wait(60)
        second = engine.submit("x" * 60, params, lambda chunk: None)  # the engine finds that it does not fit
        deadline = time.monotonic() + 60
        while not engine._scheduler._waiting.blocked and time.monotonic() < deadline:
            time.sleep(0.01)
        with pytest.raises(ToolchainError, match="waiting already"):
            engine.submit("x" * 60, params, lambda chunk: None)
        first.cancel()
        assert len(second.result().token_ids) == 150


def test_too_little_memory_for_one_request_is_said(tiny: Tiny) -> None:
    model = load_source(tiny("qwen3_moe"), device=torch.device("cpu"))
    runner = Runner(
        model=model,
        device=torch.device("cpu"),
        paging=Paging(max_batch_size=2, max_seq_len=512, memory_bytes=1000),
    )
    with pytest.raises(ToolchainError, match="512 positions takes"):
        runner.probe()
    assert model.config._attn_implementation == "sdpa"


def test_a_checkpoint_for_longer_texts_than_memory_is_limited_and_said(tiny: Tiny) -> None:
    """Nobody planned its millions of positions; an engine's are a promise, and refused."""
    cpu = torch.device("cpu")
    plain = Way(packed=False, paged=False, kv_in_fp8=False)
    with LocalEngine.load(tiny("qwen3_moe"), device="cpu", dtype=torch.float32, way=plain) as whole:
        wanted = expected(whole, PROMPTS[0], 5)
        model, tokenizer, ends = whole.model, whole.tokenizer, whole.end_ids
    page = 2 * 2 * 2 * 32 * 4 * PAGE
    limits = Limits(max_batch_size=4, max_seq_len=10**7)
    paging = Paging(max_batch_size=4, max_seq_len=10**7, planned=False, memory_bytes=page * 8)
    model.set_attn_implementation("sdpa")
    with LocalEngine(model, tokenizer, device=cpu, limits=limits, paging=paging, end_ids=ends) as engine:
        assert engine.limits.max_seq_len == 3 * PAGE
        assert f"requests end at {3 * PAGE} positions of 10000000" in engine.notes[0]
        params = SamplingParams(max_tokens=5)
        assert list(engine.generate(PROMPTS[0], params).token_ids) == wanted
        with pytest.raises(ToolchainError, match=str(3 * PAGE)):
            engine.generate("x" * 5 * PAGE, params)


def test_models_without_pages_need_no_memory_for_them(tiny: Tiny) -> None:
    model = load_source(tiny("llama4_text"), device=torch.device("cpu"))
    paging = Paging(max_batch_size=8, max_seq_len=10**7, memory_bytes=1000, in_fp8=True)
    runner = Runner(model=model, device=torch.device("cpu"), paging=paging)
    runner.probe()
    assert "attends in chunks; the cache is transformers' own" in runner.notes[0]


def test_sizes_that_cannot_be_captured_run_plainly(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Captures by a stand-in that runs the step again: what a graph reads is what is put into its inputs."""

    class Replay:
        def __init__(self, decoder: Any, inputs: Any) -> None:
            self.graph, self.logits = self, decoder._run(inputs).clone()
            self.again = lambda: self.logits.copy_(decoder._run(inputs))

        def replay(self) -> None:
            self.again()

    def captured(decoder: Decoder, inputs: Any) -> Replay:
        if inputs.host.shape[1] == 2:
            raise RuntimeError("operation not permitted when stream is capturing")
        return Replay(decoder, inputs)

    monkeypatch.setattr(Decoder, "_captured", captured)
    model = load_source(tiny("qwen3_moe"), device=torch.device("cpu"), dtype=torch.float32)
    runner = Runner(
        model=model, device=torch.device("cpu"), paging=Paging(max_batch_size=4, max_seq_len=2 * PAGE)
    )
    runner.probe()
    assert runner.paged is not None
    pages = runner.paged.pages
    for slot in range(4):
        pages.table[slot] = torch.tensor([2 * slot + 1, 2 * slot + 2], dtype=torch.int32)
    both = [
        Decoder(model, pages, device=torch.device("cpu"), max_rows=4, graphs=graphs, options={})
        for graphs in (True, False)
    ]
    with torch.inference_mode():
        assert (
            both[0].try_out() == "at 2 rows, RuntimeError: operation not permitted when stream is capturing"
        )
        steps = [
            ([5, 6, 7], [0, 1, 2], [1, 1, 1]),
            ([8], [3], [1]),
            ([9, 4], [2, 0], [2, 2]),
            ([1, 2, 3, 4], [3, 2, 1, 0], [2, 3, 2, 3]),
        ]
        for step in steps:
            first, second = (decoder.step(*step).clone() for decoder in both)
            assert torch.equal(first, second)


@pytest.mark.parametrize(("kind", "why"), [("llama4_text", "attends in chunks"), ("minimax", "")])
def test_models_that_cannot_are_run_as_before_and_said(kind: str, why: str, tiny: Tiny) -> None:
    with LocalEngine.load(tiny(kind), device="cpu", dtype=torch.float32, way=PAGED) as engine:
        if why:
            assert any(why in note for note in engine.notes)
        assert answers(engine, 3) == [expected(engine, prompt, 3) for prompt in PROMPTS]


@pytest.mark.parametrize(
    ("kind", "kv_cache"), [("qwen3_moe", "fp8"), ("deepseek_v3", "none"), ("gpt_oss", "fp8")]
)
def test_memory_is_what_was_planned(kind: str, kv_cache: str, tiny: Tiny, tmp_path: Path) -> None:
    """Weights and cache of a GPU, byte for byte but for the page that belongs to nobody."""
    cpu, directory = torch.device("cpu"), tmp_path / "checkpoint"
    format = "w4a16_nvfp4"
    plan = plan_for(
        tiny(kind), format, kv_cache=kv_cache, gpu="h200", serving=Serving(max_batch_size=8, max_seq_len=512)
    )
    quantize(plan, directory)
    model = load_packed(directory, device=cpu)
    planned = plan.estimates
    assert packed_bytes(model) == pytest.approx(planned.weights_per_gpu_bytes, rel=0.1)
    runner = Runner(
        model=model.float(),
        device=cpu,
        paging=Paging(max_batch_size=8, max_seq_len=512, in_fp8=kv_cache == "fp8"),
    )
    runner.probe()
    assert runner.paged is not None
    held = runner.paged.pages.nbytes / (1 if kv_cache == "fp8" else 2)  # float32 here, BF16 there
    assert held == pytest.approx(planned.kv_cache_per_gpu_bytes, rel=0.02)


def test_pages_go_back() -> None:
    pool = PagePool(slots=3, pages=10, page_size=64, longest=400)
    owners = [object() for _ in range(4)]
    first = pool.reserve(owners[0], 65)
    assert first is not None and len(first.pages) == 2 and 0 not in first.pages
    assert pool.reserve(owners[0], 65) == first
    assert len(pool.reserve(owners[1], 400).pages) == 7  # type: ignore[union-attr]
    assert pool.reserve(owners[2], 65) is None
    assert pool.reserve(owners[3], 1) is not None
    pool.keep_only([owners[3]])
    assert pool.free == 9
    again = pool.reserve(owners[2], 400)
    assert again is not None and not set(again.pages) & set(pool.of(owners[3]).pages)


def test_sizes_of_batches() -> None:
    assert sizes_up_to(1) == [1]
    assert sizes_up_to(8) == [1, 2, 4, 8]
    assert sizes_up_to(300)[-3:] == [192, 256, 300]


def test_the_plain_path_is_said_where_a_user_reads_it(
    tiny: Tiny, tmp_path: Path, toolchain: Callable[..., Any]
) -> None:
    directory = tmp_path / "checkpoint"
    quantize(plan_for(tiny("qwen3_moe"), "nvfp4"), directory)
    ran = toolchain("generate", directory, "--prompt", "x", "--max-tokens", 1)
    assert ran.status == 0 and "decoded: the fused kernels need an NVIDIA GPU, this is cpu" in ran.err
    ran = toolchain("generate", directory, "--prompt", "x", "--max-tokens", 1, "--kernels", "off")
    assert ran.status == 0 and "fused" not in ran.err


def test_ways(tiny: Tiny, tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    way = choose_way(tiny("qwen3_moe"), cpu, None, Wish(), emulate=True)
    assert way == Way(packed=False, paged=False, kv_in_fp8=False)
    directory = tmp_path / "checkpoint"
    quantize(plan_for(tiny("qwen3_moe"), "fp8", kv_cache="fp8"), directory)
    way = choose_way(directory, cpu, None, Wish(), emulate=True)
    assert not way.packed and way.kv_in_fp8 and "need an NVIDIA GPU" in way.notes[0]
    assert choose_way(directory, cpu, None, Wish(kernels="off"), emulate=True).notes == ()
    (note,) = choose_way(directory, cpu, None, Wish(kernels="off", kv_layout="static"), emulate=True).notes
    assert "not heeded on cpu" in note
    wrong: dict[str, Any] = {"kv_layout": "striped"}
    with pytest.raises(UsageError, match="paged or static"):
        Wish(**wrong)
