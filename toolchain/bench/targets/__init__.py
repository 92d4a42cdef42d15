"""What can be measured: one file for each protocol. ``make_target`` imports only the one that is asked for."""

from __future__ import annotations

from toolchain.bench.targets.base import Target, TargetSpec


def make_target(spec: TargetSpec) -> Target:
    """The target of ``spec``, not connected yet."""
    if spec.kind == "triton-grpc":
        from toolchain.bench.targets.triton_grpc import TritonGrpc

        return TritonGrpc(spec)
    if spec.kind == "triton-http":
        from toolchain.bench.targets.triton_http import TritonHttp

        return TritonHttp(spec)
    if spec.kind == "openai":
        from toolchain.bench.targets.openai import OpenAi

        return OpenAi(spec)
    from toolchain.bench.targets.inprocess import InProcess

    return InProcess(spec)
