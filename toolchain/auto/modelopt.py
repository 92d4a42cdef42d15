"""Damage as ModelOpt scores it: ``mtq.auto_quantize``, by gradients or by KL.

Its own solver is not used: it counts bits without the scales of each matrix, and only those of Linears, while a budget
here is one of checkpoint bytes. Its scores are per group and add up, so they go into the same knapsack as ours.
"""

from __future__ import annotations

import contextlib
import io
from typing import Any

import torch

from toolchain.auto.space import Space
from toolchain.core.errors import ToolchainError
from toolchain.core.progress import Progress
from toolchain.formats import get_format
from toolchain.modeling.loading import load_source, pick_device
from toolchain.models.reader import resolve_model
from toolchain.plan.types import SOURCE_DTYPE, Plan
from toolchain.quantize import backend
from toolchain.quantize.calibration import load_calibration
from toolchain.quantize.quantizers import quantizer_settings

ANY_BITS = 15.5
"""A budget that every choice meets: the scores are what is wanted."""


def modelopt_scores(
    space: Space,
    plan: Plan,
    *,
    device: str,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    progress: Progress,
) -> dict[tuple[str, str], float]:
    """(group name, format name) -> score, summed over the groups that ModelOpt makes of ours; ``source`` is 0.

    Calibration tokens of ``plan`` find the ranges and the scores. Ranges are plain maxima, also for formats whose
    recipe searches channel scales: ``auto_quantize`` takes no AWQ or SmoothQuant. ToolchainError TC-225 when ModelOpt
    left a group out.
    """
    import modelopt.torch.quantization as mtq

    source = resolve_model(plan.model)
    target = pick_device(device)
    batches = [
        batch.to(target)
        for batch in load_calibration(plan.calibration, source, progress).batches(plan.calibration.batch_size)
    ]
    progress.note(f"loading {source} on {target}")
    model: Any = load_source(source, device=target, dtype=dtype, trust_remote_code=trust_remote_code)
    backend.register()
    configs = [_config(name) for name in space.formats]
    progress.note(f"ModelOpt auto_quantize, {space.auto.method}: {len(batches)} batches")
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        _, state = mtq.auto_quantize(
            model,
            constraints={"effective_bits": ANY_BITS},
            quantization_formats=configs,
            data_loader=batches,
            forward_step=_forward(space.auto.method),
            loss_func=_loss if space.auto.method == "gradient" else None,
            disabled_layers=_disabled(model, space),
            num_calib_steps=len(batches),
            num_score_steps=len(batches),
            method=space.auto.method,
        )
    return _by_group(space, state, configs)


def _config(format_name: str) -> dict[str, Any]:
    """The quantizers that our own job gives the format, as a config of ModelOpt."""
    entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for kind, settings in quantizer_settings(get_format(format_name)).items():
        entries.append({"quantizer_name": f"*{kind}", "cfg": settings, "enable": True})
    return {"quant_cfg": entries, "algorithm": "max"}


def _forward(method: str) -> Any:
    def step(model: Any, batch: torch.Tensor) -> Any:
        logits = model(input_ids=batch, use_cache=False).logits
        return logits if method == "kl_div" else logits.float()

    return step


def _loss(logits: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
    """Next-token cross entropy of the text itself."""
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())


def _disabled(model: Any, space: Space) -> list[str]:
    """Module paths that are not searched. ModelOpt matches them as patterns; paths have no special characters."""
    searched = {space.info.family.to_module(name) for group in space.groups for name in group.modules}
    return [
        path
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and path not in searched
    ]


def _by_group(
    space: Space, state: dict[str, Any], configs: list[dict[str, Any]]
) -> dict[tuple[str, str], float]:
    from modelopt.torch.quantization.algorithms import QuantRecipe

    names = {
        QuantRecipe(config, name=f"CUSTOM_{index}"): name
        for index, (config, name) in enumerate(zip(configs, space.formats, strict=True))
    }
    group_of = {
        space.info.family.to_module(module): group.name for group in space.groups for module in group.modules
    }
    scores = {(group.name, SOURCE_DTYPE): 0.0 for group in space.groups}
    for found in state["candidate_stats"].values():
        owner = group_of.get(found["module_names"][0])
        if owner is None:
            continue
        for recipe, score in zip(found["formats"], found["scores"], strict=True):
            name = names.get(recipe)
            if name is not None:
                scores[owner, name] = scores.get((owner, name), 0.0) + float(score)
    missing = [
        f"{group} in {name}"
        for group, sizes in space.options.items()
        for name in sizes
        if (group, name) not in scores
    ]
    if missing:
        raise ToolchainError(
            f"ModelOpt scored {len(scores)} choices and left out {len(missing)}: {', '.join(missing[:3])}",
            hint="use --auto-method sensitivity",
            code="TC-225",
        )
    return scores
