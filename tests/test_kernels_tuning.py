"""Tuning in Triton's interpreter: what is tried, what is kept, when it is done again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.planning import plan_for
from toolchain.build.local import why_not_tuned, write_local_files
from toolchain.core.errors import ToolchainError
from toolchain.core.gpus import GPUS, get_gpu, is_named
from toolchain.core.progress import Silent
from toolchain.kernels.kinds import KINDS, W4A4
from toolchain.kernels.settings import BUCKETS, Settings, Shape, bucket, candidates, default
from toolchain.kernels.table import (
    Identity,
    identity_of,
    kernels_digest,
    read_table,
    settings_of,
    write_table,
)
from toolchain.modeling.packed import load_packed
from toolchain.modeling.packed.loading import OLDEST
from toolchain.modeling.packed.tuning import jobs_of, token_counts, tune
from toolchain.quantize.job import quantize
from toolchain.runtime.location import Limits
from toolchain.runtime.tuned import tuned
from toolchain.targets.local import LOCAL, PACKED

Tiny = Callable[[str], Path]
CPU = torch.device("cpu")
LIMITS = Limits(max_batch_size=1, max_seq_len=64)


@pytest.fixture(scope="module")
def checkpoint(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tuning") / "checkpoint"
    quantize(plan_for(tiny("qwen3_moe"), "nvfp4"), directory, device="cpu")
    return directory


def few(shape: Shape, tokens: int, processors: int) -> Iterator[Settings]:
    yield default(shape, tokens, processors)
    yield Settings(block_m=16, block_n=128, block_k=64)
    yield Settings(block_m=16, block_n=64, block_k=48)  # no power of two: it cannot run


def test_the_fastest_that_is_right_is_kept(checkpoint: Path) -> None:
    model = load_packed(checkpoint, device=CPU, dtype=torch.float32)
    ((gate_up, down),) = jobs_of(model)
    assert (gate_up.shape.key, down.shape.key) == ("nvfp4-e2m1/256x128/4e2/gated", "nvfp4-e2m1/128x128/4e2")
    found = tune(model, tokens=[1, 2], device=CPU, progress=Silent(), pick=few)
    assert found.tried == 8 and found.failed == 4
    for rows in found.table.values():
        assert set(rows) == {"1", "2"}
        for row in rows.values():
            assert 0 < row["microseconds"] <= row["default_microseconds"]
            assert row["block_k"] != 48


def test_what_gives_something_else_is_left_out(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A candidate that computed nonsense fast would win any race."""
    from toolchain.kernels import launch

    right = launch.multiply

    def wrong(packed: Any, x: Any, settings: Settings, **options: Any) -> torch.Tensor:
        out = right(packed, x, settings, **options)
        return out * 1.5 if settings.block_n == 128 else out

    monkeypatch.setattr(launch, "multiply", wrong)
    model = load_packed(checkpoint, device=CPU, dtype=torch.float32)
    found = tune(model, tokens=[1], device=CPU, progress=Silent(), pick=few)
    assert found.failed == found.tried


def test_what_leaves_its_output_unwritten_is_left_out(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory that was just given back may still hold the right answer: of the fastest candidate of all."""
    from toolchain.kernels import launch

    right = launch.multiply
    last: list[torch.Tensor] = []

    def lazy(packed: Any, x: Any, settings: Settings, **options: Any) -> torch.Tensor:
        if settings.block_n == 128:
            return options["out"] if options["out"] is not None else last[-1]
        last.append(right(packed, x, settings, **options))
        return last[-1]

    monkeypatch.setattr(launch, "multiply", lazy)
    model = load_packed(checkpoint, device=CPU, dtype=torch.float32)
    found = tune(model, tokens=[1], device=CPU, progress=Silent(), pick=few)
    assert found.failed == found.tried


def test_both_multiplications_of_experts_run_with_what_was_measured(checkpoint: Path) -> None:
    """They share one sorting: the rows of a block are those that suit both, not the first one alone."""

    def rows(shape: Shape, tokens: int, processors: int) -> Iterator[Settings]:
        yield default(shape, tokens, processors)
        for block_m in (32, 64):
            yield Settings(block_m=block_m, block_n=64, block_k=64)

    seconds = iter([5.0, 1.0, 2.0, 5.0, 9.0, 3.0])  # gate and up with 16, 32 and 64 rows, then down
    model = load_packed(checkpoint, device=CPU, dtype=torch.float32)
    found = tune(
        model, tokens=[1], device=CPU, progress=Silent(), pick=rows, measure=lambda *_: next(seconds)
    )
    assert found.failed == 0 and next(seconds, None) is None
    assert [row["1"]["block_m"] for row in found.table.values()] == [64, 64]
    chooser = model.toolchain_chooser
    chooser.use(settings_of(found.table))
    ((gate_up, down),) = jobs_of(model)
    first, second = chooser.pair(gate_up.shape, down.shape, 1)
    assert (first.block_m, second.block_m) == (64, 64)
    chooser.use({gate_up.shape.key: {1: first}})  # a table that does not know both
    first, second = chooser.pair(gate_up.shape, down.shape, 1)
    assert first == default(gate_up.shape, 1, chooser.processors)
    assert second == default(down.shape, 1, chooser.processors)


def test_an_engine_is_tuned_once_for_each_machine(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"pick": few, "tokens": [1, 2]}
    model = load_packed(checkpoint, device=CPU, dtype=torch.float32)
    notes = tuned(model, tmp_path, LIMITS, device=CPU, **options)
    assert "tuned for no GPU yet" in notes[0] and "stored in" in notes[1]
    again = load_packed(checkpoint, device=CPU, dtype=torch.float32)
    assert tuned(again, tmp_path, LIMITS, device=CPU, **options) == []
    for job in jobs_of(model)[0]:
        for tokens in (1, 2):
            assert again.toolchain_chooser.settings(job.shape, tokens) == model.toolchain_chooser.settings(
                job.shape, tokens
            )
    import triton

    monkeypatch.setattr(triton, "__version__", "99.0")
    notes = tuned(again, tmp_path, LIMITS, device=CPU, **options)
    assert "another triton" in notes[0] and "here '99.0': tuning again" in notes[0]
    assert len(list((tmp_path / "kernels").glob("*.json"))) == 2


def test_a_damaged_table_is_said_and_made_again(checkpoint: Path, tmp_path: Path) -> None:
    file = write_table(tmp_path, identity_of(CPU), {})
    file.write_text(file.read_text().replace('"table": {}', '"table": {"a": {"1": {"block_m": "x"}}}'))
    with pytest.raises(ToolchainError, match="cannot be used"):
        read_table(tmp_path, identity_of(CPU))
    model = load_packed(checkpoint, device=CPU, dtype=torch.float32)
    notes = tuned(model, tmp_path, LIMITS, device=CPU, pick=few, tokens=[1])
    assert "cannot be used" in notes[0]
    assert read_table(tmp_path, identity_of(CPU))


def test_a_table_of_another_model_is_no_table(checkpoint: Path, tmp_path: Path) -> None:
    """Left by the engine that was here before: what this one needs is tuned, and said; the rest stays."""
    options: dict[str, Any] = {"pick": few, "tokens": [1]}
    model = load_packed(checkpoint, device=CPU, dtype=torch.float32)
    row = {**Settings(block_m=16, block_n=64, block_k=64).as_json(), "microseconds": 1.0}
    write_table(tmp_path, identity_of(CPU), {"nvfp4-e2m1/1x1": {"1": row}})
    broken = tmp_path / "kernels" / "nvidia-b200-0123.json"
    broken.write_text("{")
    notes = tuned(model, tmp_path, LIMITS, device=CPU, **options)
    assert "does not know nvfp4-e2m1/256x128/4e2/gated" in notes[0]
    table = read_table(tmp_path, identity_of(CPU))
    assert table is not None and set(table) > {"nvfp4-e2m1/1x1"} and len(table) == 3
    assert tuned(model, tmp_path, LIMITS, device=CPU, **options) == []
    notes = tuned(model, tmp_path, LIMITS, device=CPU, pick=few, tokens=[1, 2])
    assert "tuned now" in notes[0]
    table = read_table(tmp_path, identity_of(CPU))
    assert table is not None and set(table["nvfp4-e2m1/256x128/4e2/gated"]) == {1, 2}
    (tmp_path / "kernels" / identity_of(CPU).file).unlink()
    assert "tuned for no GPU yet" in tuned(model, tmp_path, LIMITS, device=CPU, **options)[0]


def test_a_bare_checkpoint_keeps_no_table(checkpoint: Path) -> None:
    model = load_packed(checkpoint, device=CPU, dtype=torch.float32)
    notes = tuned(model, None, LIMITS, device=CPU, pick=few, tokens=[1])
    assert "has no table" in notes[0] and not (checkpoint / "kernels").exists()


def test_names_of_tables_tell_machines_apart() -> None:
    one = Identity(
        gpu="NVIDIA H200",
        capability="9.0",
        processors=132,
        torch="2.13",
        triton="3.7",
        cuda="13",
        kernels=kernels_digest(),
    )
    other = Identity(**{**vars(one), "triton": "3.8"})
    assert one.file.startswith("nvidia-h200-") and one.file != other.file


@pytest.mark.parametrize("kind", [*KINDS.values(), W4A4], ids=lambda kind: f"{kind.format}-{kind.code}")
@pytest.mark.parametrize("tokens", BUCKETS)
def test_candidates_are_sizes_that_the_product_takes(kind: Any, tokens: int) -> None:
    """Powers of two that the product takes; blocks within one scale of 128 where that multiplies sums."""
    shape = Shape(kind=kind, n=1536, k=2048, experts=128, top_k=8, gated=True)
    found = list(candidates(shape, tokens, 132))
    assert 6 <= len(found) <= 120 and len(set(found)) == len(found)
    for settings in found:
        for size in (settings.block_m, settings.block_n, settings.block_k, settings.split_k, settings.warps):
            assert size & (size - 1) == 0
        assert settings.block_m >= 16 and settings.block_n >= 32 and settings.block_k >= 32
        assert not kind.multiplies_sums or settings.block_k <= 128


def test_plans_count_as_packed_what_the_kernels_read() -> None:
    assert set(PACKED) == set(KINDS) and LOCAL.packed_since == 10 * OLDEST[0] + OLDEST[1]


def test_numbers_of_tokens() -> None:
    assert bucket(1) == 1 and bucket(3) == 4 and bucket(10**6) == BUCKETS[-1]
    assert token_counts(5) == [1, 2, 4, 8]


def test_gpus_are_known_by_their_drivers_names() -> None:
    names = {
        "a100": "NVIDIA A100-SXM4-80GB", "h100": "NVIDIA H100 80GB HBM3", "h200": "NVIDIA H200", "b200": "NVIDIA B200",
        "rtx4090": "NVIDIA GeForce RTX 4090", "rtxpro6000": "NVIDIA RTX PRO 6000 Blackwell Workstation Edition",
        "dgxspark": "NVIDIA GB10", "l4": "NVIDIA L4",
    }  # fmt: skip
    for name, driver in names.items():
        assert is_named(get_gpu(name), driver), name
    assert not is_named(get_gpu("l4"), "NVIDIA L40S") and not is_named(get_gpu("h100"), "NVIDIA H200")
    assert all(gpu.name == gpu.name.lower() for gpu in GPUS)


def test_a_build_without_its_gpu_says_so(checkpoint: Path, tiny: Tiny) -> None:
    plan = plan_for(tiny("qwen3_moe"), "nvfp4", gpu="h200")
    said: list[str] = []

    class Notes(Silent):
        def note(self, text: str) -> None:
            said.append(text)

    assert write_local_files(checkpoint.parent, plan, progress=Notes()) == []
    assert "there is no H200" in said[0] and "when it is loaded first" in said[0]
    assert why_not_tuned(checkpoint, plan_for(tiny("qwen3_moe"), "nvfp4")) == "the engine is for a CPU"
