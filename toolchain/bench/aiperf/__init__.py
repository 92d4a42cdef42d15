"""aiperf, NVIDIA's load generator, as another engine of ``toolchain bench``. See README.md of toolchain/bench."""

from toolchain.bench.aiperf.run import run_aiperf

__all__ = ["run_aiperf"]
