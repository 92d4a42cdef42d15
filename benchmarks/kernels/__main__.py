"""python -m benchmarks.kernels run | check | table. See README.md."""

from __future__ import annotations

import argparse
import json
import sys
import time
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

RESULT = Path(__file__).parent.parent / "results" / "kernels.json"
GOALS = {
    "memory-bound, 4 bits": "at least 60 % of the limit and 2.5x BF16",
    "memory-bound, FP8": "at least 60 % of the limit and 1.6x BF16",
    "batch 4096": "at least 0.9x BF16 (W4A16), 1.4x (FP8)",
    "decoding": "at least 1.8x BF16",
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser(
        "run", help="measure on this machine's NVIDIA GPU; without one nothing is measured"
    )
    run.add_argument("--layers", default="*", help="names or patterns, with commas")
    run.add_argument("--formats", default="*")
    run.add_argument("--skip-decoding", action="store_true")
    run.add_argument("--skip-layers", action="store_true")
    run.add_argument("--seconds", type=float, default=1e9, help="start no further row after so many")
    run.add_argument(
        "--smoke", action="store_true", help="tiny, in Triton's interpreter: that it runs; writes nothing"
    )
    run.add_argument("--output", type=Path, default=RESULT)
    check = commands.add_parser("check", help="correctness of every kernel on this machine's GPU")
    check.add_argument("--small", action="store_true", help="small shapes: for compute-sanitizer")
    check.add_argument("--smoke", action="store_true", help="small shapes in Triton's interpreter")
    table = commands.add_parser("table", help="print what was measured")
    table.add_argument("--input", type=Path, default=RESULT)
    options = parser.parse_args()
    {"run": _run, "check": _check, "table": _table}[options.command](options)


def _run(options: argparse.Namespace) -> None:
    if options.smoke:
        import os

        os.environ["TRITON_INTERPRET"] = "1"
    import torch

    from benchmarks.kernels.layers import FORMATS, LAYERS, SMOKE, TOKENS
    from benchmarks.kernels.limits import measure_limits

    if not options.smoke and not torch.cuda.is_available():
        print("no NVIDIA GPU here: nothing was measured, nothing was written")
        return
    device = torch.device("cpu" if options.smoke else "cuda")
    layers = (SMOKE,) if options.smoke else [item for item in LAYERS if _chosen(item.name, options.layers)]
    formats = tuple(name for name in FORMATS if _chosen(name, options.formats))
    result = _identity(torch, device)
    started = time.monotonic()

    def write() -> None:
        if not options.smoke:
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text(json.dumps(result, indent=1) + "\n")

    result["limits"] = measure_limits(device)
    result["layers"], result["decoding"] = [], []
    late = lambda: time.monotonic() - started > options.seconds  # noqa: E731
    if not options.skip_decoding:
        from benchmarks.kernels.decoding import measure_decoding

        batches = (1, 2) if options.smoke else (1, 32)
        for format in ("nvfp4", "int4_awq", "fp8"):
            if format in formats and not late():
                result["decoding"] += measure_decoding((format,), device, batches, smoke=options.smoke)
                write()
    for layer in [] if options.skip_layers else layers:
        _layer(
            layer,
            formats,
            (1, 8) if options.smoke else TOKENS,
            device,
            result,
            late,
            write,
            smoke=options.smoke,
        )
    write()
    _print(result)


def _check(options: argparse.Namespace) -> None:
    if options.smoke:
        import os

        os.environ["TRITON_INTERPRET"] = "1"
    import torch

    from benchmarks.kernels.check import check

    if not options.smoke and not torch.cuda.is_available():
        print("no NVIDIA GPU here: nothing was checked")
        return
    found = check(torch.device("cpu" if options.smoke else "cuda"), smoke=options.smoke or options.small)
    worst = max(found["errors"], key=lambda case: found["errors"][case])
    print(f"{len(found['errors'])} cases, largest relative RMS {found['errors'][worst]:.4f} ({worst})")
    if found["problems"]:
        raise SystemExit("\n".join(found["problems"]))


def _layer(
    layer: Any,
    formats: tuple[str, ...],
    tokens: Any,
    device: Any,
    result: Any,
    late: Any,
    write: Any,
    *,
    smoke: bool,
) -> None:
    from benchmarks.kernels.experts import Ours, measure, transformers_experts

    bf16 = transformers_experts(layer, device)
    for format in formats:
        if late():
            return
        ours = Ours(layer, format, device)
        for count in tokens:
            result["layers"].append(measure(ours, count, bf16, result["limits"], quick=smoke))
            write()
        del ours


def _identity(torch: Any, device: Any) -> dict[str, Any]:
    import triton

    from toolchain.core.environment import git_commit

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "Triton's interpreter"
    return {
        "device": name,
        "versions": {"torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda},
        "git_commit": git_commit(),
        "goals": GOALS,
    }


def _chosen(name: str, patterns: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns.split(","))


def _table(options: argparse.Namespace) -> None:
    if not options.input.is_file():
        print(f"{options.input} is not there: nothing has been measured yet")
        return
    _print(json.loads(options.input.read_text()))


def _print(result: dict[str, Any]) -> None:
    write = sys.stdout.write
    write(f"{result['device']}, {result['versions']}\n")
    limits = result["limits"]
    write(
        f"limits: {limits['bytes_per_s'] / 1e12:.2f} TB/s, {limits['bf16_per_s'] / 1e12:.0f} TFLOP/s BF16, "
        f"{limits['fp8_per_s'] / 1e12:.0f} FP8\n"
    )
    write(
        "layer | format | variant | tokens | us | limit us | of the limit | bound | x BF16 | x dequantize | RMS\n"
    )
    for row in result["layers"]:
        write(
            f"{row['layer']} | {row['format']} | {row['variant']} | {row['tokens']} | {row['seconds'] * 1e6:.1f} | "
            f"{row['limit_s'] * 1e6:.1f} | {row['limit_s'] / row['seconds']:.0%} | {row['bound']} | "
            f"{row['bf16_s'] / row['seconds']:.2f} | {row['dequantize_s'] / row['seconds']:.2f} | {row['error']:.4f}\n"
        )
    for row in result["decoding"]:
        write(
            f"decoding {row['format']} batch {row['batch']}: {row['tokens_per_s']:.1f} tokens/s, BF16 "
            f"{row['bf16_tokens_per_s']:.1f}: {row['tokens_per_s'] / row['bf16_tokens_per_s']:.2f}x\n"
        )


if __name__ == "__main__":
    main()
