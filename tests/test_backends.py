"""MoE backends against the documents of TensorRT-LLM, typed off here once more."""

from __future__ import annotations

import itertools
import re

import pytest

from toolchain.core.errors import UsageError
from toolchain.families import FAMILIES
from toolchain.formats import FORMATS, get_format
from toolchain.targets import LINES, TARGETS, TRTLLM, Wish, moe_backend, moe_backends

QWEN3_MOE = next(family for family in FAMILIES if family.name == "qwen3_moe")
SMS = (80, 89, 90, 100, 103, 120, 121)
BLACKWELL, RTX, ADA_TO_HOPPER = {100, 103}, {120, 121}, {89, 90}
EVERY, FROM_ADA = set(SMS), set(SMS) - {80}

# "Quantization Support" of tensorrt_llm/_torch/modules/fused_moe/MOE_DEVELOPER_GUIDE.md@04c2347 (August 2026), and the
# same table of tensorrt_llm/_torch/moe/fused_moe/MOE_DEVELOPER_GUIDE.md@00b8228: format -> backend -> SMs.
# MXFP4 is three rows there: W4A16 below SM100, W4A8 with MXFP8 activations from SM100 on (get_mxfp4_quant_algo).
GUIDE: dict[str, dict[str, set[int]]] = {
    "fp8": {"CUTLASS": FROM_ADA, "TRITON": {90}},
    "fp8_block": {"CUTLASS": {90, 120}, "TRTLLM": BLACKWELL, "DEEPGEMM": BLACKWELL},
    "nvfp4": {
        "CUTLASS": BLACKWELL | RTX,
        "TRTLLM": BLACKWELL,
        "DENSEGEMM": BLACKWELL,
        "CUTEDSL": BLACKWELL | RTX,
        "MARLIN": ADA_TO_HOPPER,
    },
    "w4a16_nvfp4": {"CUTLASS": EVERY, "CUTEDSL": RTX, "MARLIN": ADA_TO_HOPPER},
    "w4a8_nvfp4_fp8": {"TRTLLM": BLACKWELL},
    "mxfp4": {"CUTLASS": {90} | BLACKWELL, "TRTLLM": BLACKWELL, "TRITON": {90}},
    "mxfp8": {"CUTLASS": BLACKWELL},
    "w4a8_awq": {"CUTLASS": ADA_TO_HOPPER},
    "int8_wo": {"CUTLASS": EVERY},
    "int4_awq": {},
    "int4_gptq": {},
    "int8_sq": {},
    "fp8_per_channel_per_token": {},
}
BACKENDS = ("CUTLASS", "TRTLLM", "CUTEDSL", "DEEPGEMM", "DENSEGEMM", "MARLIN", "TRITON")
# The guide leaves SM120 out; the hardware matrix and an earlier copy of fused_moe_cutlass.py have it: a guess.
GUESSED = {("mxfp4", "CUTLASS", 120)}

# MoeConfig.backend in the LLM API reference of 1.3.0rc27, without AUTO.
LITERAL_1_3 = {
    "CUTLASS", "CUTEDSL", "TRTLLM", "DEEPGEMM", "DENSEGEMM", "VANILLA", "TRITON", "MARLIN", "MEGAMOE_DEEPGEMM",
    "MEGAMOE_CUTEDSL",
}  # fmt: skip

# What the documents of older releases have: (release, SM, format) -> the backends that run it.
OLDER: dict[tuple[str, int, str], set[str]] = {
    # Release notes of 1.0: TRTLLM MoE for NVFP4, DeepSeek-R1 FP8 on Blackwell. Release notes of 1.1: CuteDSL for NVFP4.
    ("1.0.0", 100, "nvfp4"): {"CUTLASS", "TRTLLM"},
    ("1.1.0", 100, "nvfp4"): {"CUTLASS", "TRTLLM", "CUTEDSL"},
    ("1.2.1", 103, "nvfp4"): {"CUTLASS", "TRTLLM"},
    ("1.2.1", 100, "fp8_block"): {"TRTLLM", "DEEPGEMM"},
    ("1.2.1", 90, "fp8_block"): {"CUTLASS"},
    # gpt-oss deployment guide of 1.2.1: TRITON on H200, TRTLLM on B200 and B300; CUTLASS "at first".
    ("1.1.0", 90, "mxfp4"): {"TRITON"},
    ("1.1.0", 100, "mxfp4"): {"TRTLLM", "CUTLASS"},
    ("1.2.1", 90, "nvfp4"): set(),
    ("1.3.0rc20", 90, "nvfp4"): {"MARLIN"},
    ("1.2.1", 120, "fp8_block"): set(),
}


def running(version: str, sm: int, format: str) -> set[str]:
    states = moe_backends(version, sm, get_format(format))
    return {item.name for item in states if item.state != "no" and item.name in BACKENDS}


def test_the_guide_speaks_about_every_format() -> None:
    assert set(GUIDE) == {item.name for item in FORMATS}


@pytest.mark.parametrize("version", ["1.3.0rc29", "1.4.0rc1"])
@pytest.mark.parametrize("format", GUIDE)
def test_newest_releases_are_the_guide(version: str, format: str) -> None:
    for sm in SMS:
        expected = {name for name, sms in GUIDE[format].items() if sm in sms}
        guessed = {name for name in BACKENDS if (format, name, sm) in GUESSED}
        assert running(version, sm, format) == expected | guessed, sm


@pytest.mark.parametrize(("request_", "expected"), OLDER.items(), ids=[str(item) for item in OLDER])
def test_older_releases(request_: tuple[str, int, str], expected: set[str]) -> None:
    version, sm, format = request_
    assert running(version, sm, format) == expected


def test_every_backend_of_the_release_is_listed_with_reason_and_source() -> None:
    states = moe_backends("1.3.0rc29", 90, get_format("nvfp4"))
    assert {item.name for item in states} == LITERAL_1_3
    for item in states:
        assert item.source
        assert bool(item.reason) or item.state == "yes"
    assert {item.name for item in states if item.preferred} == {"MARLIN"}


def test_literals_of_other_lines() -> None:
    """WIDEEP until 1.3, TRITON from 1.1 on, MARLIN and DENSEGEMM from 1.3 on (copies of llm_args.py, page of rc27)."""
    known = {line.name: set(line.backends) for line in LINES}
    assert known["1.3"] == known["1.4"] == LITERAL_1_3
    assert "TRITON" not in known["1.0"]
    for name in ("1.1", "1.2"):
        assert known[name] == {"CUTLASS", "CUTEDSL", "WIDEEP", "TRTLLM", "DEEPGEMM", "VANILLA", "TRITON"}


CITED = re.compile(
    r"@[0-9a-f]{7}|pull request \d+|release notes|/\d+\.\d+\.\d+(rc\d+)?/|issue \d+|copy of|older copies|main of"
)


def test_every_row_of_every_line_has_a_source_that_can_be_looked_up() -> None:
    for line in LINES:
        for row in (*line.rows, *line.kv_rows, *line.head_rows):
            assert CITED.search(row.source), (line.name, row)
            assert row.state == "yes" or row.note, (line.name, row)
        for item in line.known_bad:
            assert item.link.startswith("https://github.com/NVIDIA/TensorRT-LLM/")
        assert CITED.search(line.backends_source)
        assert CITED.search(line.eplb_source)


def test_guesses_are_marked_and_limited() -> None:
    guesses = [
        (line.name, row)
        for line in LINES
        for row in (*line.rows, *line.kv_rows, *line.head_rows)
        if row.is_guess
    ]
    # What the sources leave open, and nothing else: see README.md of the room.
    assert {(name, row.formats[0]) for name, row in guesses} == {
        ("1.2", "mxfp4"), ("1.3", "w4a16_nvfp4"), ("1.3", "fp8"),
    }  # fmt: skip
    assert {row.state for _, row in guesses} == {"limited"}


@pytest.mark.parametrize(
    ("version", "sm", "format", "backend"),
    [
        # gpt-oss deployment guide of 1.2.1; resolve_moe_backend, main of August 2026, for the rest.
        ("1.2.1", 90, "mxfp4", "TRITON"),
        ("1.2.1", 100, "mxfp4", "TRTLLM"),
        ("1.2.1", 120, "mxfp4", "CUTLASS"),
        # Deployment guides for DeepSeek-R1 of 1.0.0, 1.2.1 and 1.3.0rc29.
        ("1.0.0", 100, "fp8_block", "DEEPGEMM"),
        ("1.2.1", 100, "fp8_block", "DEEPGEMM"),
        ("1.2.1", 90, "fp8_block", "CUTLASS"),
        ("1.3.0rc29", 100, "fp8_block", "DEEPGEMM"),
        ("1.4.0rc1", 90, "w4a16_nvfp4", "MARLIN"),
        ("1.4.0rc1", 120, "w4a16_nvfp4", "CUTEDSL"),
        ("1.4.0rc1", 100, "w4a16_nvfp4", "CUTLASS"),
        ("1.4.0rc1", 100, "nvfp4", "CUTLASS"),
    ],
)
def test_what_is_chosen_is_what_the_guides_have(version: str, sm: int, format: str, backend: str) -> None:
    chosen, reason = moe_backend(version, sm, get_format(format), QWEN3_MOE)
    assert chosen == backend
    assert f"SM{sm}" in reason


def test_a_choice_names_what_else_could_be_measured() -> None:
    _, reason = moe_backend("1.2.1", 100, get_format("nvfp4"), QWEN3_MOE)
    assert "TRTLLM" in reason
    assert "CUTEDSL" in reason


def test_the_reference_is_never_chosen_and_can_be_asked_for() -> None:
    for version, sm, item in itertools.product(TRTLLM.versions, SMS, FORMATS):
        row = TRTLLM.find(format_name=item.name, sm=sm, model="moe", version=version)
        assert row is None or row.backend != "VANILLA"
    asked, _ = moe_backend("1.2.1", 100, get_format("nvfp4"), QWEN3_MOE, Wish(backend="vanilla"))
    assert asked == "VANILLA"


@pytest.mark.parametrize(
    ("version", "sm", "format", "backend", "words"),
    [
        ("1.2.1", 100, "nvfp4", "MARLIN", ("does not know it", "1.3", "CUTLASS or CUTEDSL or TRTLLM")),
        ("1.4.0rc1", 100, "nvfp4", "WIDEEP", ("does not know it",)),
        ("1.4.0rc1", 100, "fp8_block", "CUTEDSL", ("reference loop", "DEEPGEMM or TRTLLM")),
        ("1.2.1", 100, "fp8_block", "CUTLASS", ("only support Hopper", "DEEPGEMM or TRTLLM")),
        ("1.2.1", 90, "fp8", "TRTLLM", ("no kernels for fp8 on SM90", "CUTLASS")),
        ("1.2.1", 90, "fp8", "FASTEST", ("does not know it",)),
    ],
)
def test_what_the_table_lacks_is_refused(
    version: str, sm: int, format: str, backend: str, words: tuple[str, ...]
) -> None:
    with pytest.raises(UsageError) as raised:
        moe_backend(version, sm, get_format(format), QWEN3_MOE, Wish(backend=backend))
    assert raised.value.code == "TC-129"
    for word in words:
        assert word in f"{raised.value} {raised.value.hint}"


def test_auto_is_resolved_here() -> None:
    assert moe_backend("1.2.1", 100, get_format("nvfp4"), QWEN3_MOE, Wish(backend="AUTO"))[0] == "CUTLASS"


def test_what_cannot_do_expert_parallelism_gives_way() -> None:
    """The guide: CuteDslB12xFusedMoE rejects ep_size > 1 and attention data parallelism."""
    wished = get_format("w4a16_nvfp4")
    for wish in (Wish(ep=2), Wish(attention_dp=True)):
        assert moe_backend("1.4.0rc1", 120, wished, QWEN3_MOE, wish)[0] == "CUTLASS"
    with pytest.raises(UsageError, match="expert parallelism"):
        moe_backend("1.4.0rc1", 120, wished, QWEN3_MOE, Wish(backend="CUTEDSL", ep=2))


def test_load_balancing_by_release() -> None:
    """1.1: create_moe.py asserts WideEPMoE; release notes of 1.2: "EPLB for trtllm-gen and cutlass backend"."""
    wished = get_format("nvfp4")
    with pytest.raises(UsageError, match="no expert load balancing"):
        moe_backend("1.1.0", 100, wished, QWEN3_MOE, Wish(backend="CUTLASS", eplb=True))
    assert moe_backend("1.1.0", 100, wished, QWEN3_MOE, Wish(eplb=True))[0] == "WIDEEP"
    assert moe_backend("1.2.1", 100, wished, QWEN3_MOE, Wish(eplb=True))[0] == "CUTLASS"
    with pytest.raises(UsageError) as raised:
        moe_backend("1.3.0rc22", 90, wished, QWEN3_MOE, Wish(eplb=True))
    assert raised.value.code == "TC-129"
    assert "without --eplb-slots there is MARLIN" in raised.value.hint


def test_targets_without_a_choice_have_no_backends() -> None:
    for target in TARGETS:
        assert bool(target.lines) == (target is TRTLLM)
