"""The catalogue of numbered errors and findings, for ``toolchain explain CODE``: one file per range.

0xx input and files, 1xx planning, 2xx quantization, 3xx verification, 4xx build, 5xx runtime and evaluation,
6xx Triton and serving, 7xx benchmarks, 8xx reports, 9xx publishing. Each file holds ``CODES``: code -> (title, what to
do).
"""

from __future__ import annotations

from toolchain.core.codes import (
    c0_input,
    c1_plan,
    c2_quantize,
    c3_verify,
    c4_build,
    c4_deploy,
    c5_runtime,
    c5_tasks,
    c6_triton,
    c7_bench,
    c8_report,
    c9_publish,
)

CODES: dict[str, tuple[str, str]] = {
    **c0_input.CODES,
    **c1_plan.CODES,
    **c2_quantize.CODES,
    **c3_verify.CODES,
    **c4_build.CODES,
    **c4_deploy.CODES,
    **c5_runtime.CODES,
    **c5_tasks.CODES,
    **c6_triton.CODES,
    **c7_bench.CODES,
    **c8_report.CODES,
    **c9_publish.CODES,
}
