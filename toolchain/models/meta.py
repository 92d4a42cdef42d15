"""The inventory of a model that has only a config.json: built on the meta device, without memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from toolchain.core.errors import ToolchainError
from toolchain.families import get_family
from toolchain.families.base import Family
from toolchain.models.prequantized import scheme_of
from toolchain.models.types import TensorInfo


def meta_tensors(source: str, config: dict[str, Any], *, trust_remote_code: bool = False) -> list[TensorInfo]:
    """Tensors that ``save_pretrained`` of this config's model would write, by their checkpoint names.

    transformers 5 holds the experts of a layer as [E, 2*I, H] and [E, H, I]; families that store one matrix
    per expert get them back here. Raises ToolchainError TC-021 when transformers cannot build the model.
    """
    model = _build(source, config, trust_remote_code=trust_remote_code)
    # Tied weights are one parameter under two names, and are saved under the first.
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    state = {name: value for name, value in model.state_dict().items() if name not in tied}
    names = [name.replace(".experts.gate_up_proj", ".experts.0.gate_proj") for name in state]
    family = get_family(
        config.get("model_type", ""), config["architectures"][0], _usual_names(names), config=config
    )
    return [
        TensorInfo(name=stored, shape=shape, dtype=_dtype_name(value.dtype))
        for name, value in state.items()
        for stored, shape in stored_tensors(family, name, tuple(value.shape))
    ]


def _usual_names(names: list[str]) -> list[str]:
    """Names in which the generic rule can recognise experts, although transformers has fused them."""
    result = []
    for name in names:
        if name.endswith(".experts.0.gate_proj"):
            result += [f"{name}.weight", name.replace("gate_proj", "up_proj") + ".weight"]
        elif name.endswith(".experts.down_proj"):
            result.append(name.replace(".experts.down_proj", ".experts.0.down_proj.weight"))
        else:
            result.append(name)
    return result


def stored_tensors(
    family: Family, name: str, shape: tuple[int, ...]
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(checkpoint name, shape) of each tensor that one state-dict entry of transformers 5 is saved as."""
    head, _, leaf = name.rpartition(".")
    if family.expert_storage == "fused_in_out" or not head.endswith(".experts") or len(shape) != 3:
        yield family.to_checkpoint(name), shape
        return
    experts, out_features, in_features = shape
    projections = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else (leaf,)
    for expert in range(experts):
        for projection in projections:
            stored = family.to_checkpoint(f"{head}.{expert}.{projection}")
            yield f"{stored}.weight", (out_features // len(projections), in_features)


def _build(source: str, config: dict[str, Any], *, trust_remote_code: bool) -> Any:
    import torch
    import transformers

    try:
        parsed = transformers.AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
        # The named class is the one whose checkpoint this is; an auto class may drop a vision tower.
        builder = getattr(transformers, config["architectures"][0], None)
        # A config without a dtype means float32; but of a quantized release BF16 (``VALUE_DTYPE``).
        silent = torch.bfloat16 if scheme_of(config) else torch.float32
        dtype = getattr(parsed, "dtype", None) or silent
        with torch.device("meta"):
            if builder is not None and hasattr(builder, "_from_config"):
                return builder._from_config(parsed, dtype=dtype)
            return transformers.AutoModelForCausalLM.from_config(
                parsed, dtype=dtype, trust_remote_code=trust_remote_code
            )
    except Exception as error:
        raise ToolchainError(
            f"transformers {transformers.__version__} cannot build {config['architectures'][0]} from "
            f"{source}/config.json: {error}",
            hint="put the safetensors files beside it: their headers then tell all, without a model class",
            code="TC-021",
        ) from error


def _dtype_name(dtype: Any) -> str:
    names = {"torch.bfloat16": "BF16", "torch.float16": "F16", "torch.float32": "F32", "torch.int64": "I64"}
    return names.get(str(dtype), "F32")
