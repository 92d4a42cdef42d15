"""Learned block scales of NVFP4 weights: ModelOpt's LSQ, in the arithmetic of what ships.

Parameters, forward pass and gradients are ModelOpt's (``StaticBlockScaleQuantizer.enable_lsq``): a weight is
``round(w / s_pre) * s_post``, where ``s_pre`` stays as it began and ``s_post`` is learned (ModelOpt's default). Both
begin at the block scales with the least squared error, as ModelOpt's do (``scale_algorithm``). Two pieces are our own,
because ModelOpt's would not be what is packed: its FP4 cast is a Triton kernel without a version for CPUs, and its E4M3
rounding multiplies by reciprocals where its exporter and our codecs divide.
"""

from __future__ import annotations

from typing import Any

import torch
from modelopt.torch.quantization.nn.modules.tensor_quantizer import StaticBlockScaleQuantizer
from torch import nn
from torch.distributed.tensor import DTensor

from toolchain.codecs import compiled, e2m1, get_codec
from toolchain.codecs.base import Calibrated
from toolchain.core.errors import ToolchainError
from toolchain.formats import get_format
from toolchain.qat.roles import trained_roles
from toolchain.qat.student import Student
from toolchain.quantize import backend, scales
from toolchain.quantize.accuracy.grids import Nvfp4Grid
from toolchain.quantize.accuracy.scale_search import choose_scales

LEARNABLE = ("post",)
"""ModelOpt's ``learnable_amax``. What each choice gave on the demo: README.md of this room."""
PRE, POST = "_amax_pre", "_amax_post"
"""ModelOpt's names of the largest magnitudes that a block can store, under codes and under values."""


class LearnedScaleQuantizer(StaticBlockScaleQuantizer):
    """ModelOpt's LSQ over weights [out, in] with blocks along ``in``, bit-equal to ``packed`` in its forward pass.

    To the rest of the toolchain it stays a quantizer of dynamic blocks with one ``amax`` for the tensor.
    """

    @property
    def amax(self) -> Any:
        """Of the whole tensor, which the plan keeps: not learned, shared by fused members."""
        return self.global_amax

    @amax.setter
    def amax(self, value: torch.Tensor) -> None:
        self.global_amax = value

    @property
    def weight_scale_2(self) -> torch.Tensor:
        """float32 scalar as stored: of blocks whose kernels expand them to E4M3, another."""
        scale = e2m1.global_scale_fp8 if self.backend_extra_args == backend.FP8_RANGE else e2m1.global_scale
        return scale(self.global_amax.reshape(()))

    def stored_scales(self, amax: torch.Tensor) -> torch.Tensor:
        """Float amax of blocks -> E4M3 block scales as stored, same shape."""
        ratio = amax.detach().float() / (e2m1.E2M1_MAX * self.weight_scale_2)
        return ratio.clamp(e2m1.E4M3_TINY, e2m1.E4M3_MAX).to(torch.float8_e4m3fn)

    def _fake_quantize(self, inputs: torch.Tensor) -> torch.Tensor:
        blocks = inputs.reshape(-1, self.block_sizes[-1])
        pre, post = (_local(amax).reshape(-1) for amax in (self.amax_pre, self.amax_post))
        found: torch.Tensor = _RoundUnderLearned.apply(blocks, pre, post, self)
        return found.reshape(inputs.shape)


class _RoundUnderLearned(torch.autograd.Function):
    """Weights [blocks, elements], amax [blocks] under codes (fixed) and under values (learned) -> what is stored.

    Straight through for weights up to 6 of their scale, 0 beyond, as ModelOpt's ``fp4_cast_ste`` has it; straight
    through the rounding of scales, also beyond the range of E4M3: a block that starts at its very end, as that of the
    largest weight does, could never learn otherwise.
    """

    @staticmethod
    def forward(
        ctx: Any,
        blocks: torch.Tensor,
        pre: torch.Tensor,
        post: torch.Tensor,
        quantizer: LearnedScaleQuantizer,
    ) -> torch.Tensor:
        scale_2 = quantizer.weight_scale_2
        found = compiled.learned_nvfp4(blocks, pre, post, scale_2)
        if found is None:
            under, over = (quantizer.stored_scales(amax).float() * scale_2 for amax in (pre, post))
            scaled = blocks.float() / under.unsqueeze(-1)
            values, inside = e2m1.round_values(scaled), scaled.abs() <= e2m1.E2M1_MAX
            found = values * over.unsqueeze(-1), values.to(blocks.dtype), inside, over / under
        out, *saved = found
        ctx.save_for_backward(*saved)
        return out.to(blocks.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, torch.Tensor, None]:
        values, inside, slopes = ctx.saved_tensors
        gradient = gradients[0].float()
        of_post = (gradient * values).sum(-1).div_(e2m1.E2M1_MAX)
        of_blocks = (gradient * slopes.unsqueeze(-1)).mul_(inside).to(gradients[0].dtype)
        return of_blocks, None, of_post, None


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def enable_learned_scales(student: Student, paths: list[str] | None = None) -> dict[str, nn.Parameter]:
    """Make the block scales of ``paths`` (all quantized matrices whose format allows it) parameters of the model.

    They begin at the E4M3 codes with the least squared error, what recipe ``mse`` would store, and no longer follow the
    weights; those of a student that has them already stay as they are. Returns the parameters, float32 [out, in /
    block], by their names in ``student.model``. ToolchainError TC-260 when no matrix has scales that can be learned.
    """
    chosen = learnable(student) if paths is None else paths
    if not chosen:
        raise ToolchainError(
            f"no matrix of this model has block scales that can be learned: its formats are "
            f"{sorted(set(student.modules.values()))}",
            hint="train without --learned-scales, or choose an NVFP4 format",
            code="TC-260",
        )
    found: dict[str, nn.Parameter] = {}
    for path in chosen:
        linear: Any = student.model.get_submodule(path)
        quantizer = linear.weight_quantizer
        if not isinstance(quantizer, LearnedScaleQuantizer):
            _enable(quantizer, linear.weight)
        found.update((f"{path}.weight_quantizer.{name}", p) for name, p in quantizer.named_parameters())
    return found


def learnable(student: Student) -> list[str]:
    """Paths of the quantized matrices whose weights are trained and whose format has scales that can be learned."""
    roles, family = trained_roles(student), student.family
    return [
        path
        for path, name in student.modules.items()
        if get_format(name).learned_scales and family.classify(family.to_checkpoint(path)).role in roles
    ]


def _enable(quantizer: Any, weight: torch.Tensor) -> None:
    tensor_amax = quantizer.amax.reshape(()).float().clone()
    del quantizer._amax
    LearnedScaleQuantizer.from_tensor_quantizer(quantizer, global_amax=tensor_amax)
    quantizer._quant_max_bound = e2m1.E2M1_MAX
    grid = Nvfp4Grid(quantizer.weight_scale_2, quantizer.block_sizes[-1])
    stored = choose_scales(whole(weight.detach()).float(), grid, "mse")
    quantizer._amax = stored.float() * (e2m1.E2M1_MAX * quantizer.weight_scale_2)
    quantizer.enable_lsq(quantize_scales=True, learnable_amax=LEARNABLE)


def learned_quantizers(student: Student) -> dict[str, LearnedScaleQuantizer]:
    """Module path -> its weight quantizer, where scales are learned."""
    found = {}
    for path in student.modules:
        quantizer = student.model.get_submodule(path).weight_quantizer
        if isinstance(quantizer, LearnedScaleQuantizer):
            found[path] = quantizer
    return found


def learned_state(student: Student) -> dict[str, torch.Tensor]:
    """All that ``restore_learned`` needs, by the names of parameters and buffers in ``student.model``: float32 on the
    CPU. A collective where the parameters are cut over several devices."""
    return {
        f"{path}.weight_quantizer.{name}": whole(getattr(quantizer, name).detach()).float().cpu().clone()
        for path, quantizer in learned_quantizers(student).items()
        for name in (PRE, POST)
    }


@torch.no_grad()
def restore_learned(student: Student, state: dict[str, torch.Tensor]) -> dict[str, nn.Parameter]:
    """Put ``learned_state`` into a student, whose quantizers become learned ones where they are not yet.

    An empty state changes nothing: a training that gained nothing keeps the start. ToolchainError TC-261 when the state
    is of other matrices.
    """
    paths = list(dict.fromkeys(key.rpartition(".weight_quantizer.")[0] for key in state))
    unknown = [path for path in paths if path not in student.modules]
    if unknown:
        raise ToolchainError(
            f"learned scales of {len(unknown)} matrices that this plan does not quantize: {unknown[:3]}",
            hint="they belong to another model or plan",
            code="TC-261",
        )
    found = enable_learned_scales(student, paths) if paths else {}
    for path in paths:
        quantizer: Any = student.model.get_submodule(path).weight_quantizer
        for name in (PRE, POST):
            key = f"{path}.weight_quantizer.{name}"
            tensor, given = getattr(quantizer, name), state.get(key)
            if given is None or given.shape != tensor.shape:
                raise ToolchainError(
                    f"{key}: expected {list(tensor.shape)}, found {None if given is None else list(given.shape)}",
                    hint="the saved scales belong to another model or plan",
                    code="TC-261",
                )
            tensor.copy_(given)
    return found


@torch.no_grad()
def packed_with_learned(student: Student) -> dict[str, dict[str, torch.Tensor]]:
    """Module path -> suffix -> tensor as the codec stores it, for every matrix with learned scales.

    Their decoded values are those that the student computes with, bit for bit: codes are chosen under the first
    scales, values stand under the learned ones, rounded to E4M3.
    """
    packed = {}
    for path, quantizer in learned_quantizers(student).items():
        linear: Any = student.model.get_submodule(path)
        codec = get_codec(student.modules[path])
        has_input = codec.format.has_input_scale
        observed = scales.calibrated(linear, path, needs_input=has_input)
        codes_under = Calibrated(
            weight_amax=quantizer.amax.reshape(()).float(),
            input_amax=observed.input_amax,
            weight_scale=quantizer.stored_scales(whole(quantizer.amax_pre)),
        )
        tensors = codec.pack(whole(linear.weight.detach()), codes_under)
        tensors["weight_scale"] = quantizer.stored_scales(whole(quantizer.amax_post))
        packed[path] = tensors
    return packed


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, gathered where it is cut over devices (FSDP2)."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
