"""LoRA under fake quantization: every trained matrix computes Q(W + s * B @ A) on Q(x), with the quantizers it was
calibrated with.

The layers are peft's own, around the student's quantized Linears. peft does not put them in place
(``inject_adapter_in_model``): for model types whose experts transformers 5 fuses it rewrites targets to the fused
parameters (``convert_peft_config_for_transformers`` of peft 0.21), which a student with one Linear per expert has not.
ModelOpt's own class for this (``_QuantLoraLinear``) starts with new quantizers and computes B @ A in the precision of
autocast: under bf16 the merged weight would not be the one that was trained.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn
from torch.func import functional_call

from toolchain.checkpoint.source import open_source
from toolchain.core.errors import UsageError
from toolchain.core.files import atomic_write_json
from toolchain.core.roles import Role
from toolchain.plan.steps import Training
from toolchain.qat.roles import trainable_parameters
from toolchain.qat.student import Student

ADAPTER = "default"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
APART = "adapters.json"
"""Name of the configuration of adapters that peft would load onto other matrices than they are of."""
PREFIX = "base_model.model."
"""What peft puts before every name in its files."""


class AdaptedLinear(LoraLinear):
    """peft's LoRA layer around a quantized Linear ``base_layer``, which computes on the sum of both weights."""

    def __init__(self, base_layer: nn.Module, config: LoraConfig, *, sparse: bool) -> None:
        """``sparse``: weights of ``base_layer`` that are zero stay zero, whatever the adapter says."""
        super().__init__(base_layer, ADAPTER, config, r=config.r, lora_alpha=config.lora_alpha)
        self.sparse = sparse

    @property
    def weight_quantizer(self) -> Any:
        return self.base_layer.weight_quantizer

    @property
    def input_quantizer(self) -> Any:
        return self.base_layer.input_quantizer

    def summed(self) -> torch.Tensor:
        """W + s * B @ A, [out, in] in the dtype of W: in its precision even under autocast."""
        weight = self.base_layer.weight
        with torch.autocast(weight.device.type, enabled=False):
            change = self.get_delta_weight(ADAPTER)
            return weight + (change * (weight != 0) if self.sparse else change)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return functional_call(self.base_layer, {"weight": self.summed()}, (x,))


def add_lora(student: Student) -> dict[str, nn.Parameter]:
    """Put adapters of rank ``plan.training.lora_rank`` on the Linears of the trained roles; returns what is trained.

    That is the adapters, and what else has a role that was asked for without being a Linear (norms, embeddings, most
    routers), by name. Weights and biases of the adapted Linears are frozen. B is zero, so the student computes what it
    did before; A is random by the plan's seed, the same in every process. UsageError TC-258 when there is nothing to
    adapt, or when the rank is larger than a matrix.
    """
    training = _training(student)
    trained = {id(parameter) for parameter in trainable_parameters(student).values()}
    sites = [
        (path, module)
        for path, module in student.model.named_modules()
        if isinstance(module, nn.Linear) and id(module.weight) in trained
    ]
    _require(student, sites, training.lora_rank)
    config = _config(training)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        for path, linear in sites:
            linear.requires_grad_(False)
            sparse = student.plan.sparsity is not None and path in student.modules
            _replace(student.model, path, AdaptedLinear(linear, config, sparse=sparse))
    return {name: item for name, item in student.model.named_parameters() if item.requires_grad}


@torch.no_grad()
def merge_lora(student: Student) -> None:
    """Put W + s * B @ A into plain quantized Linears again, in place: bit for bit the weight that was trained."""
    for path, adapted in list(_adapted(student.model)):
        summed, linear = adapted.summed(), adapted.get_base_layer()
        linear.weight.data.copy_(summed)
        _replace(student.model, path, linear)


def save_adapters(student: Student, directory: Path) -> bool:
    """Write the adapters in peft's format, under the names of the checkpoint and for the weights of the source.

    Where the recipe moved a channel scale p into the weights (AWQ, SmoothQuant), the student's W is the source's
    W / p: A is multiplied by p, so that B @ A is to be added to the source's own weight. Returns False where peft
    cannot load them; their configuration then has another name, so that peft does not try (README).
    """
    from safetensors.torch import save_file

    factors = _channel_factors(student)
    tensors: dict[str, torch.Tensor] = {}
    names: list[str] = []
    for path, adapted in _adapted(student.model):
        names.append(student.family.to_checkpoint(path))
        down, up = adapted.lora_A[ADAPTER].weight.detach(), adapted.lora_B[ADAPTER].weight.detach()
        if path in factors:
            down = down * factors[path]
        tensors[f"{PREFIX}{names[-1]}.lora_A.weight"] = down.cpu().contiguous()
        tensors[f"{PREFIX}{names[-1]}.lora_B.weight"] = up.cpu().contiguous()
    config = _config(
        _training(student),
        target_modules=sorted({name.rpartition(".")[2] for name in names}),
        base_model_name_or_path=student.plan.model,
    )
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    found = json.loads(json.dumps(config.to_dict(), default=sorted))
    loadable = _peft_loads(student, names)
    atomic_write_json(directory / (CONFIG if loadable else APART), found)
    return loadable


def _peft_loads(student: Student, names: list[str]) -> bool:
    """Whether peft 0.21 puts adapters of the checkpoint modules ``names`` where they belong, in transformers 5.

    In a mixture of experts it takes every target that is called like an expert's projection for the fused experts,
    those of shared experts and dense layers too; and it knows no names for experts that are stored fused.
    """
    family = student.family
    roles = {name: family.classify(name).role for name in names}
    experts = {name for name, role in roles.items() if role is Role.ROUTED_EXPERT}
    if family.num_experts_key is None:
        return True
    others = any(name.rpartition(".")[2] in family.gate_up_down for name in roles.keys() - experts)
    return not others and not (experts and family.fuses_experts)


def _training(student: Student) -> Training:
    if student.plan.training is None:
        raise ValueError("adapters belong to a plan with training")
    return student.plan.training


def _config(training: Training, **where: Any) -> LoraConfig:
    """Without dropout and without biases: what is trained is a change of the weight, and merges into it."""
    scaling: dict[str, Any] = {
        "r": training.lora_rank,
        "lora_alpha": training.lora_alpha or training.lora_rank,
    }
    return LoraConfig(task_type="CAUSAL_LM", **scaling, **where)


def _require(student: Student, sites: list[tuple[str, nn.Module]], rank: int) -> None:
    if not sites:
        raise UsageError(
            "no matrix of this model has a role that is trained, so there is nothing to put adapters on",
            hint="choose other roles, or train without adapters",
            code="TC-258",
        )
    path, smallest = min(
        ((path, min(linear.weight.shape)) for path, linear in sites), key=lambda item: item[1]
    )
    if not 0 < rank <= smallest:
        raise UsageError(
            f"adapters of rank {rank}: {path} has {smallest} rows or columns, and a larger rank adds nothing",
            hint=f"choose a rank of at most {smallest}",
            code="TC-258",
        )
    model: Any = student.model
    embedding = model.get_input_embeddings().weight
    if any(linear.weight is embedding for _, linear in sites):
        raise UsageError(
            "lm_head shares its weight with the embedding, which an adapter would not change",
            hint="leave lm_head out of the trained roles, or train without adapters",
            code="TC-258",
        )


def _adapted(model: nn.Module) -> Iterator[tuple[str, AdaptedLinear]]:
    for path, module in model.named_modules():
        if isinstance(module, AdaptedLinear):
            yield path, module


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def _channel_factors(student: Student) -> dict[str, torch.Tensor]:
    """Module path -> p [in]: the student's inputs are the source's times p, its weights the source's over p."""
    factors = {}
    reader = open_source(student.source)
    for path, _ in _adapted(student.model):
        scale = getattr(student.model.get_submodule(path).input_quantizer, "_pre_quant_scale", None)
        norm = _folded_norm(student, path)
        if scale is not None:
            factors[path] = scale.float()
        elif norm is not None:
            after = student.model.get_submodule(norm).weight.detach().float()
            before = reader.get(f"{student.family.to_checkpoint(norm)}.weight").float().to(after.device)
            factors[path] = torch.where(before == 0, torch.ones_like(before), after / before)
    return factors


def _folded_norm(student: Student, path: str) -> str | None:
    """The norm that took the channel scale of ``path``, if one did."""
    for norm, consumers in student.family.norm_folds:
        for consumer in consumers:
            layer = path.removesuffix(f".{consumer}")
            if layer != path and f"{layer}.{norm}" in student.folded_norms:
                return f"{layer}.{norm}"
    return None
