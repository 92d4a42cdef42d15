"""Ahead-of-time compilation of the kernels for GPUs that are not there, and what their machine code uses.

``python -m toolchain.kernels.aot [--sm 90 --sm 100] [--json]`` compiles every kernel and prints a table. Needs neither
a GPU nor a driver: triton brings its own assembler.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from toolchain.kernels.variants import Variant, variants

SHARED_BYTES = {
    80: 163 * 1024,
    **dict.fromkeys((90, 100, 103), 227 * 1024),
    **dict.fromkeys((89, 120, 121), 99 * 1024),
}
"""Most shared memory of one block (CUDA C++ programming guide, table of compute capabilities), by ten times that:
A100, L4 and L40S, H100 and H200, B200, B300, RTX PRO 6000, GB10."""
ARCHITECTURES = tuple(sorted(SHARED_BYTES))


@dataclass(frozen=True, kw_only=True)
class Compiled:
    name: str
    sm: int
    registers: int
    spilled_bytes: int
    """Of local memory per thread: registers that did not fit."""
    shared_bytes: int
    instructions: str
    """Which tensor cores: ``wgmma``, ``mma``, ``tcgen05``, or none."""


def compile_variant(variant: Variant, sm: int) -> Compiled:
    """Raises what triton raises when the kernel does not compile."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, name in enumerate(variant.function.arg_names):
        if name in variant.constants:
            signature[name] = "constexpr"
            constants[(index,)] = variant.constants[name]
        elif name in variant.pointers:
            signature[name] = f"*{variant.pointers[name]}"
            attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = variant.scalars[name]
            if name in variant.divisible:
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=variant.function, signature=signature, constexprs=constants, attrs=attributes)
    made = triton.compile(
        source,
        target=GPUTarget("cuda", sm, 32),
        options={"num_warps": variant.warps, "num_stages": variant.stages},
    )
    registers, spilled = _resources(made.asm["cubin"])
    return Compiled(
        name=variant.name,
        sm=sm,
        registers=registers,
        spilled_bytes=spilled,
        shared_bytes=int(made.metadata.shared),
        instructions=_tensor_cores(made.asm["ptx"]),
    )


def _tensor_cores(ptx: str) -> str:
    for found, pattern in (("tcgen05", "tcgen05.mma"), ("wgmma", "wgmma.mma_async"), ("mma", "mma.sync")):
        if pattern in ptx:
            return found
    return ""


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of local memory per thread, from the machine code."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        printed = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers = re.findall(r"REG:(\d+)", printed)
    stack = re.findall(r"STACK:(\d+)", printed)
    local = re.findall(r"LOCAL:(\d+)", printed)
    return max(map(int, registers)), max(map(int, stack)) + max(map(int, local))


def compile_all(architectures: tuple[int, ...] = ARCHITECTURES, only: str = "") -> Iterator[Compiled]:
    """Variants whose name holds ``only``, for every architecture that runs them."""
    for variant in variants():
        for sm in architectures:
            if variant.runs_on(sm) and only in variant.name:
                yield compile_variant(variant, sm)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sm", type=int, action="append", help="compute capability times ten; default: all")
    parser.add_argument("--only", default="", help="kernels whose name holds this")
    parser.add_argument("--json", action="store_true", help="a line of JSON for each")
    given = parser.parse_args(arguments)
    for found in compile_all(tuple(given.sm or ARCHITECTURES), given.only):
        if given.json:
            line = json.dumps(asdict(found))
        else:
            line = (
                f"{found.name:36} sm_{found.sm:<4} {found.registers:4} registers {found.spilled_bytes:5} B spilled "
                f"{found.shared_bytes:7} B shared  {found.instructions}"
            )
        sys.stdout.write(line + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
