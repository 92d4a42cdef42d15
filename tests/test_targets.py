"""Support tables: what TensorRT-LLM's own documents say, case by case, and version order against packaging."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolchain.core.errors import UsageError
from toolchain.core.gpus import GPUS, get_gpu
from toolchain.families import FAMILIES
from toolchain.formats import FORMATS, get_format
from toolchain.targets import TARGETS, TRTLLM, check, get_target, moe_backend, parse_version, support_table
from toolchain.targets.support import check_parts
from toolchain.targets.trtllm import REASONS

QWEN3_MOE = next(family for family in FAMILIES if family.name == "qwen3_moe")

# (release, gpu, format, mixture of experts) -> what must come back. From the hardware matrix of
# docs/source/features/quantization.md and the kernel table of fused_moe/MOE_DEVELOPER_GUIDE.md.
CASES: dict[tuple[str, str, str, bool], str] = {
    ("1.2.1", "h100", "fp8", True): "ok",
    ("1.2.1", "l40s", "fp8", True): "ok",
    ("1.2.1", "a100", "fp8", True): "error",
    ("1.2.1", "a100", "fp8", False): "error",
    ("1.2.1", "b200", "nvfp4", True): "ok",
    ("1.2.1", "b300", "nvfp4", True): "ok",
    ("1.2.1", "rtx5090", "nvfp4", True): "ok",
    ("1.2.1", "h100", "nvfp4", True): "error",
    ("1.3.0rc19", "h100", "nvfp4", True): "error",
    ("1.3.0rc20", "h100", "nvfp4", True): "warning",
    ("1.3.0rc20", "h200", "nvfp4", False): "warning",
    ("1.3.0rc20", "l40s", "nvfp4", True): "error",
    ("1.3.0rc20", "a100", "nvfp4", True): "error",
    ("1.2.1", "h100", "int4_awq", True): "error",
    ("1.4.0rc1", "b200", "int4_awq", True): "error",
    ("1.2.1", "h100", "int4_awq", False): "ok",
    ("1.2.1", "a100", "int4_awq", False): "ok",
    ("1.1.0", "b200", "int4_awq", False): "error",
    ("1.2.1", "b200", "int4_awq", False): "ok",
    ("1.4.0rc1", "b200", "int4_awq", False): "ok",
    ("1.4.0rc1", "rtx5090", "int4_awq", False): "error",
    # FP8 in blocks of 128: Hopper; on SM100 with scales turned into powers of two; SM120 for experts only.
    ("1.2.1", "h100", "fp8_block", True): "ok",
    ("1.2.1", "b200", "fp8_block", True): "warning",
    ("1.2.1", "l40s", "fp8_block", False): "error",
    ("1.3.0rc20", "rtx5090", "fp8_block", True): "warning",
    ("1.3.0rc20", "rtx5090", "fp8_block", False): "error",
    # FP8 by row: a Hopper format, without any MoE kernel.
    ("1.2.1", "h100", "fp8_per_channel_per_token", False): "ok",
    ("1.2.1", "b200", "fp8_per_channel_per_token", False): "error",
    ("1.4.0rc1", "h100", "fp8_per_channel_per_token", True): "error",
    # The algorithm's name was missing on 2026-07-02 (pull request 15886): rc20 is of 06-30, rc22 of 07-22.
    ("1.2.1", "h100", "w4a16_nvfp4", True): "error",
    ("1.3.0rc20", "h100", "w4a16_nvfp4", True): "error",
    ("1.3.0rc22", "h100", "w4a16_nvfp4", True): "warning",
    ("1.3.0rc22", "a100", "w4a16_nvfp4", True): "warning",
    ("1.3.0rc22", "rtx5090", "w4a16_nvfp4", True): "warning",
    # Pull request 6809, in the release notes of 1.1.0rc4.
    ("1.0.0", "b200", "w4a8_nvfp4_fp8", True): "error",
    ("1.1.0", "b200", "w4a8_nvfp4_fp8", True): "warning",
    ("1.3.0rc20", "b200", "w4a8_nvfp4_fp8", True): "warning",
    ("1.3.0rc20", "h100", "w4a8_nvfp4_fp8", True): "error",
    ("1.2.1", "h100", "mxfp4", True): "warning",
    ("1.2.1", "b200", "mxfp4", True): "warning",
    ("1.2.1", "a100", "mxfp4", True): "error",
    ("1.2.1", "b200", "mxfp4", False): "error",
    ("1.3.0rc20", "b200", "mxfp8", True): "warning",
    ("1.3.0rc20", "h100", "mxfp8", True): "error",
    ("1.2.1", "h100", "w4a8_awq", True): "ok",
    ("1.2.1", "l40s", "w4a8_awq", True): "ok",
    ("1.4.0rc1", "b200", "w4a8_awq", True): "error",
    ("1.2.1", "a100", "w4a8_awq", False): "error",
    ("1.4.0rc1", "b200", "w4a8_awq", False): "ok",
    ("1.2.1", "h100", "int4_gptq", False): "ok",
    ("1.2.1", "h100", "int4_gptq", True): "error",
    ("1.4.0rc1", "h100", "int8_sq", False): "error",
    ("1.4.0rc1", "h100", "int8_sq", True): "error",
    ("1.3.0rc20", "a100", "int8_wo", True): "warning",
    # Weight-only quantization in the PyTorch workflow: release notes of 1.0; for experts pull request 6629, after it.
    ("1.0.0", "a100", "int8_wo", False): "warning",
    ("1.0.0", "a100", "int8_wo", True): "error",
    ("1.1.0", "a100", "int8_wo", True): "warning",
    # gpt-oss: release notes of 1.1. B300: release notes of 1.1. DGX Spark: "beta" in those of 1.2.
    ("1.0.0", "h100", "mxfp4", True): "error",
    ("1.1.0", "h100", "mxfp4", True): "warning",
    ("1.0.0", "b300", "nvfp4", True): "error",
    ("1.1.0", "b300", "nvfp4", True): "ok",
    ("1.2.1", "dgxspark", "nvfp4", True): "warning",
    # Marlin on Ada: pull request 16749, merged after 2026-07-24.
    ("1.3.0rc22", "l40s", "nvfp4", True): "error",
    ("1.3.0rc29", "l40s", "nvfp4", True): "warning",
    # MXFP8: release notes of 1.3.0rc20.
    ("1.2.1", "b200", "mxfp8", True): "error",
}

# (release, gpu, KV cache, weights) -> what must come back. From the hardware matrices: NVFP4 KV on SM100 and SM103
# only, from 1.2.1's on, where the text says "only supports FP8 weight/activation quantization when NVFP4 KV cache is
# enabled".
KV_CASES: dict[tuple[str, str, str, str], str] = {
    ("1.2.1", "a100", "fp8", "int4_awq"): "ok",
    ("1.2.1", "h100", "fp8_cast", "fp8"): "ok",
    ("1.1.0", "b200", "nvfp4", "fp8"): "error",
    ("1.2.1", "b200", "nvfp4", "fp8"): "warning",
    ("1.2.1", "b200", "nvfp4", "nvfp4"): "error",
    ("1.3.0rc20", "b200", "nvfp4", "fp8"): "warning",
    ("1.4.0rc1", "h100", "nvfp4", "fp8"): "error",
    ("1.4.0rc1", "rtx5090", "nvfp4", "fp8"): "error",
}


@pytest.mark.parametrize(("request_", "expected"), CASES.items(), ids=lambda value: str(value))
def test_trtllm_table(request_: tuple[str, str, str, bool], expected: str) -> None:
    version, gpu, format, is_moe = request_
    findings = check("trtllm", version, get_gpu(gpu), get_format(format), is_moe)
    assert [finding.severity for finding in findings] == ([] if expected == "ok" else [expected])


@pytest.mark.parametrize(("request_", "expected"), KV_CASES.items(), ids=lambda value: str(value))
def test_kv_caches(request_: tuple[str, str, str, str], expected: str) -> None:
    version, gpu, kv_cache, weights = request_
    found = check("trtllm", version, get_gpu(gpu), get_format(weights), False, kv_cache)
    severities = [item.severity for item in found if item.code == "TC-122"]
    assert severities == ([] if expected == "ok" else [expected])
    for item in found:
        assert item.code != "TC-122" or "--kv-cache fp8" in item.hint


def test_every_format_has_a_row_or_a_reason() -> None:
    """Nothing is refused without saying whether a kernel for one SM is missing, or all of them."""
    sms = {gpu.sm for gpu in GPUS[1:]}
    for item, model in itertools.product(FORMATS, ("dense", "moe")):
        table = [row for line in TRTLLM.lines for row in line.rows]
        rows = [row for row in table if item.name in row.formats and model in row.models]
        assert all(set(row.sms) & sms or row.sms for row in rows)
        assert bool(rows) != ((item.name, model) in REASONS), (item.name, model)


def test_a_quantized_head_is_checked_apart() -> None:
    def found(target: str, version: str) -> list[tuple[str, str]]:
        parts = ((get_format("nvfp4"), "moe"), (get_format("nvfp4"), "lm_head"))
        return [
            (item.code, item.severity)
            for item in check_parts(get_target(target), version, get_gpu("b200"), parts)
        ]

    assert found("trtllm", "1.2.1") == [("TC-125", "error")]
    assert found("trtllm", "1.4.0rc1") == [("TC-125", "warning")]
    assert found("local", get_target("local").default_version) == []


def test_experts_and_the_rest_are_asked_for_apart() -> None:
    """INT4 AWQ runs in dense layers on Hopper; its experts do not, and FP8 beside them does."""
    parts = ((get_format("int4_awq"), "moe"), (get_format("int4_awq"), "dense"), (get_format("fp8"), "dense"))
    (finding,) = check_parts(get_target("trtllm"), "1.2.1", get_gpu("h100"), parts)
    assert "int4_awq for a mixture of experts" in finding.message
    assert check_parts(get_target("trtllm"), "1.2.1", get_gpu("h100"), parts[1:]) == []


def test_nvfp4_on_h100_names_the_release_the_backend_and_the_native_format() -> None:
    (finding,) = check("trtllm", "1.2.1", get_gpu("h100"), get_format("nvfp4"), True)
    assert finding.code == "TC-120"
    for words in ("1.3.0rc20", "MARLIN", "W4A16", "--format fp8", "b200", "--target local"):
        assert words in finding.hint


def test_every_alternative_that_is_named_really_works() -> None:
    """Follow each hint of each refusal: other formats and GPUs must come back clean, or with the limits it tells of."""
    for gpu, format, is_moe in itertools.product(GPUS[1:], FORMATS, (True, False)):
        for finding in check("trtllm", "1.2.1", gpu, format, is_moe):
            if finding.severity == "warning":
                continue
            for choice in finding.hint.split("; or "):
                names = choice.partition(",")[0].split()[1:]
                if choice.startswith("--format"):
                    assert all(
                        not check("trtllm", "1.2.1", gpu, get_format(n), is_moe) for n in names if n != "or"
                    )
                elif choice.startswith("--gpu"):
                    limited = choice.endswith(", with limits")
                    for name in (name for name in names if name != "or"):
                        found = check("trtllm", "1.2.1", get_gpu(name), format, is_moe)
                        assert bool(found) == limited and all(item.severity == "warning" for item in found)
                elif choice.startswith("needs"):
                    later = check("trtllm", names[1], gpu, format, is_moe)
                    assert all(item.severity == "warning" for item in later)


def test_int4_awq_experts_have_no_kernel_anywhere() -> None:
    for gpu in GPUS[1:]:
        (finding,) = check("trtllm", "1.4.0rc1", gpu, get_format("int4_awq"), True)
        assert "no MoE backend" in finding.message


def test_fp8_kv_cache_needs_a_gpu_of_the_matrix() -> None:
    for gpu in GPUS[1:]:
        codes = {item.code for item in check("trtllm", "1.2.1", gpu, get_format("fp8"), False, "fp8")}
        assert "TC-122" not in codes


def test_local_runs_everything_everywhere() -> None:
    for gpu, format, is_moe in itertools.product(GPUS, FORMATS, (True, False)):
        assert check("local", None, gpu, format, is_moe, "fp8") == []


def test_trtllm_does_not_run_on_a_cpu() -> None:
    (finding,) = check("trtllm", None, get_gpu("cpu"), get_format("fp8"), True)
    assert finding.code == "TC-123"


def test_the_tensorrt_target_says_what_to_use_instead() -> None:
    findings = check("tensorrt", "1.2.1", get_gpu("h100"), get_format("fp8"), False)
    assert [finding.code for finding in findings] == ["TC-124"]
    assert "--target trtllm" in findings[0].message and findings[0].severity == "warning"
    gone = check("tensorrt", "1.3.0rc22", get_gpu("h100"), get_format("fp8"), False)
    assert "TC-120" in {finding.code for finding in gone}


def test_releases_outside_of_the_tables() -> None:
    old = check("trtllm", "0.21.0", get_gpu("h100"), get_format("fp8"), True)
    assert [(item.code, item.severity) for item in old] == [("TC-106", "error")]
    new = check("trtllm", "2.0.0", get_gpu("h100"), get_format("fp8"), True)
    assert [(item.code, item.severity) for item in new] == [("TC-106", "warning")]
    with pytest.raises(UsageError, match="not a release number"):
        check("trtllm", "latest", get_gpu("h100"), get_format("fp8"), True)


@pytest.mark.parametrize(
    ("version", "sm", "format", "backend"),
    [
        ("1.2.1", 90, "fp8", "CUTLASS"),
        ("1.2.1", 100, "nvfp4", "CUTLASS"),
        ("1.2.1", 120, "nvfp4", "CUTLASS"),
        ("1.3.0rc22", 90, "nvfp4", "MARLIN"),
    ],
)
def test_moe_backend_is_always_named(version: str, sm: int, format: str, backend: str) -> None:
    chosen, reason = moe_backend(version, sm, get_format(format), QWEN3_MOE)
    assert chosen == backend
    assert reason


def test_moe_backend_refuses_what_has_no_kernel() -> None:
    with pytest.raises(UsageError, match="no MoE backend"):
        moe_backend("1.2.1", 90, get_format("int4_awq"), QWEN3_MOE)
    with pytest.raises(UsageError, match="SM90"):
        moe_backend("1.2.1", 90, get_format("nvfp4"), QWEN3_MOE)


def test_support_table_is_complete_and_agrees_with_check() -> None:
    rows = support_table()
    gpu_targets = [target for target in TARGETS if target.needs_gpu]
    combinations = len(FORMATS) * 2
    assert len(rows) == combinations * (len(GPUS) * len(TARGETS) - len(gpu_targets))
    for row in rows:
        found = check(row.target, row.version, get_gpu(row.gpu), get_format(row.format), row.model == "moe")
        errors = [item for item in found if item.severity == "error" and item.code == "TC-120"]
        assert bool(errors) == (row.state == "no")
    narrowed = support_table(gpu="h100", format="nvfp4", version="1.3.0rc20")
    assert {(row.gpu, row.format) for row in narrowed} == {("h100", "nvfp4")}
    assert {row.version for row in narrowed if row.target == "trtllm"} == {"1.3.0rc20"}


def test_unknown_target_lists_the_known() -> None:
    with pytest.raises(UsageError, match="local, trtllm, tensorrt"):
        get_target("onnx")


RELEASES = st.builds(
    "{}.{}.{}{}".format,
    st.integers(0, 3),
    st.integers(0, 12),
    st.integers(0, 3),
    st.one_of(
        st.just(""),
        st.builds("{}{}".format, st.sampled_from(["a", "b", "rc", ".dev", ".post"]), st.integers(0, 30)),
    ),
)


@given(RELEASES, RELEASES)
def test_release_order_is_that_of_python_packaging(left: str, right: str) -> None:
    packaging = pytest.importorskip("packaging.version")
    ours = (parse_version(left) < parse_version(right), parse_version(left) == parse_version(right))
    theirs = packaging.Version(left), packaging.Version(right)
    assert ours == (theirs[0] < theirs[1], theirs[0] == theirs[1])
