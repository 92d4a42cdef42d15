"""A plan, and what the request asks of training: which device that is for, how much memory it has."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from toolchain.core.gpus import get_gpu
from toolchain.models.types import ModelInfo
from toolchain.plan.training import plan_training
from toolchain.plan.training_memory import USABLE
from toolchain.plan.types import Plan

if TYPE_CHECKING:
    from toolchain.pipeline.request import EngineRequest

GIB = 1024**3


def with_training(request: EngineRequest, plan: Plan, info: ModelInfo) -> Plan:
    """``plan`` trained as ``request`` asks, all that speaks against it in findings; ``plan`` itself for no training."""
    asked = request.training_options()
    if asked is None:
        return plan
    on_cpu = trains_on_cpu(request, plan)
    training = asked.resolved(seed=request.seed, chat_template=request.chat_template, on_cpu=on_cpu)
    room, where = (_host_bytes(), "this machine") if on_cpu else _gpu_bytes(plan)
    return plan_training(
        plan,
        info,
        training,
        memory_bytes=room,
        on_host=on_cpu,
        where=where,
        teacher_bytes=_teacher_bytes(request, training.teacher),
    )


def trains_on_cpu(request: EngineRequest, plan: Plan) -> bool:
    """``--device`` says it; auto: the GPU that the plan is for, else whatever is in this machine."""
    if request.device != "auto":
        return request.device == "cpu"
    if plan.gpu != "cpu":
        return False
    import torch

    return not torch.cuda.is_available()


def _host_bytes() -> int:
    """Memory of this machine, or of its control group where that has less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text(encoding="ascii").strip() if limit.is_file() else "max"
    return min(total, int(text)) if text.isdigit() else total


def _gpu_bytes(plan: Plan) -> tuple[int, str]:
    """(bytes that tensors may take, its name); the GPU in this machine where the plan is for none."""
    if plan.gpu != "cpu":
        gpu = get_gpu(plan.gpu)
        return round(USABLE * gpu.memory_gib * GIB), f"--gpu {gpu.name}"
    import torch

    if not torch.cuda.is_available():
        return 0, ""
    found = torch.cuda.get_device_properties(0)
    return round(USABLE * found.total_memory), str(found.name)


def _teacher_bytes(request: EngineRequest, teacher: str) -> int | None:
    """Of a teacher that is not the model itself."""
    if not teacher:
        return None
    from toolchain.models.reader import read_model

    return read_model(teacher, trust_remote_code=request.trust_remote_code).bytes
