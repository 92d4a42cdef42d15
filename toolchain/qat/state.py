"""The state of a training as files: safetensors and JSON, never pickle. A checkpoint is whole under its name or absent.

``trained.safetensors``: parameters that are trained, by name, in their dtype (the frozen rest is in the start state);
``optimizer.safetensors`` + ``optimizer.json``; ``scheduler.json``; ``rng-RANK.safetensors`` + ``rng-RANK.json``;
``trainer_state.json``, transformers' own. Parameters that are cut over devices (FSDP2) are gathered: a checkpoint does
not depend on how many devices wrote it.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from toolchain.core.errors import ToolchainError
from toolchain.core.files import atomic_write_json, read_json

TRAINED, OPTIMIZER, SCHEDULER = "trained.safetensors", "optimizer", "scheduler.json"
TRAINER_STATE = "trainer_state.json"
_NAME = re.compile(r"checkpoint-(\d+)")


def checkpoints(directory: Path) -> dict[int, Path]:
    """Optimizer step -> whole checkpoint below ``directory``, oldest first."""
    found = {}
    for path in directory.glob("checkpoint-*"):
        match = _NAME.fullmatch(path.name)
        if match and (path / TRAINER_STATE).is_file():
            found[int(match.group(1))] = path
    return dict(sorted(found.items()))


def rotate(directory: Path, keep: int, best_step: int) -> None:
    """Remove all but the newest ``keep`` and the best; and what kills left half-written."""
    found = checkpoints(directory)
    for step in list(found)[: -max(1, keep)]:
        if step != best_step:
            shutil.rmtree(found[step])
    for left in directory.glob(".checkpoint-*.partial"):
        shutil.rmtree(left)


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter, of those that ask for a gradient, in the order of the model."""
    return {name: item for name, item in model.named_parameters() if item.requires_grad}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A copy on the CPU, gathered from all devices where it is cut; then a collective."""
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().to("cpu", copy=True).contiguous()


def like(tensor: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """``value`` (whole) on the device of ``tensor``, cut as ``tensor`` is."""
    value = value.to(tensor.device, tensor.dtype)
    return (
        distribute_tensor(value, tensor.device_mesh, tensor.placements)
        if isinstance(tensor, DTensor)
        else value
    )


def parameter_state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: whole(item) for name, item in trained_parameters(model).items()}


@torch.no_grad()
def restore_parameters(model: nn.Module, path: Path) -> None:
    """ToolchainError TC-256 when ``path`` holds other parameters than the model trains."""
    named, saved = trained_parameters(model), read_tensors(path)
    if named.keys() != saved.keys():
        other = sorted(named.keys() ^ saved.keys())
        raise _unusable(path, f"{len(other)} parameters are only in one of file and model: {other[:3]}")
    for name, item in named.items():
        if item.shape != saved[name].shape:
            raise _unusable(path, f"{name} has shape {list(saved[name].shape)}, not {list(item.shape)}")
        item.copy_(like(item, saved[name]))


def optimizer_state(optimizer: Any, model: nn.Module) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """Tensors by ``parameter/moment``, and the settings of each group with the names of its parameters."""
    names = {id(item): name for name, item in model.named_parameters()}
    tensors, groups = {}, []
    for group in optimizer.param_groups:
        named = [names[id(item)] for item in group["params"]]
        groups.append({**{key: value for key, value in group.items() if key != "params"}, "params": named})
        for name, item in zip(named, group["params"], strict=True):
            for key, value in optimizer.state.get(item, {}).items():
                tensors[f"{name}/{key}"] = whole(value)
    return tensors, groups


def restore_optimizer(optimizer: Any, model: nn.Module, directory: Path) -> None:
    """Inverse of ``optimizer_state``, from a checkpoint; a state that was never stepped is empty."""
    named = dict(model.named_parameters())
    tensors = read_tensors(directory / f"{OPTIMIZER}.safetensors")
    groups = read_json(directory / f"{OPTIMIZER}.json")
    if len(groups) != len(optimizer.param_groups):
        raise _unusable(
            directory, f"its optimizer has {len(groups)} groups, not {len(optimizer.param_groups)}"
        )
    settings: dict[int, dict[str, Any]] = {}
    for group, saved in zip(optimizer.param_groups, groups, strict=True):
        if [id(item) for item in group["params"]] != [id(named.get(name)) for name in saved["params"]]:
            raise _unusable(directory, "its optimizer has other parameters")
        group.update({key: _tuple(value) for key, value in saved.items() if key != "params"})
        settings = {id(named[name]): group for name in saved["params"]} | settings
    for key, value in tensors.items():
        name, _, moment = key.rpartition("/")
        item = named[name]
        optimizer.state[item][moment] = _placed(value, item, settings[id(item)])


def _placed(value: torch.Tensor, item: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
    """Moments lie as their parameter does; the step counter beside it only for a fused AdamW."""
    if value.shape == item.shape:
        return like(item, value)
    return value.to(item.device) if group.get("fused") or group.get("capturable") else value


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def rng_state() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Generators of python, numpy, torch and every CUDA device."""
    version, words, gauss = random.getstate()
    kind, key, position, has_gauss, cached = np.random.get_state()
    tensors = {
        "torch": torch.random.get_rng_state(),
        "numpy": torch.from_numpy(np.array(key)).to(torch.int64),
    }
    for index in range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0):
        tensors[f"cuda.{index}"] = torch.cuda.get_rng_state(index)
    described = {
        "python": [version, list(words), gauss],
        "numpy": [kind, int(position), int(has_gauss), float(cached)],
    }
    return tensors, described


def restore_rng(directory: Path, rank: int) -> None:
    """Nothing where another number of processes wrote the checkpoint and this one has no file."""
    path = directory / f"rng-{rank}.json"
    if not path.is_file():
        return
    described, tensors = read_json(path), read_tensors(path.with_suffix(".safetensors"))
    version, words, gauss = described["python"]
    random.setstate((version, tuple(words), gauss))
    kind, position, has_gauss, cached = described["numpy"]
    np.random.set_state((kind, tensors["numpy"].numpy().astype(np.uint32), position, has_gauss, cached))
    torch.random.set_rng_state(tensors["torch"])
    for name, value in tensors.items():
        if name.startswith("cuda.") and int(name[5:]) < torch.cuda.device_count():
            torch.cuda.set_rng_state(value, int(name[5:]))


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """safetensors, flushed to the disk: the rename of the directory must not come before its bytes."""
    save_file(tensors, path)
    with path.open("rb") as handle:
        os.fsync(handle.fileno())


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return dict(load_file(path))
    except (SafetensorError, OSError) as error:
        raise _unusable(path, str(error)) from error


def write_rng(directory: Path, rank: int) -> None:
    tensors, described = rng_state()
    write_tensors(directory / f"rng-{rank}.safetensors", tensors)
    atomic_write_json(directory / f"rng-{rank}.json", described)


def write_optimizer(directory: Path, tensors: dict[str, torch.Tensor], groups: Any, scheduler: Any) -> None:
    write_tensors(directory / f"{OPTIMIZER}.safetensors", tensors)
    atomic_write_json(directory / f"{OPTIMIZER}.json", json.loads(json.dumps(groups)))
    atomic_write_json(directory / SCHEDULER, scheduler)


def _unusable(path: Path, reason: str) -> ToolchainError:
    return ToolchainError(
        f"the training in {path} cannot go on: {reason}",
        hint="go on with the settings that it was begun with, or remove the directory to begin anew",
        code="TC-256",
    )
