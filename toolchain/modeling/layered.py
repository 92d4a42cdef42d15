"""A model whose weights stay on the disk: one decoder layer, or what lies around them all, is real at a time.

The modules are those of transformers, with their paths, so whatever works on a whole model works on the part that is
there. Everything else is a placeholder without parameters.
"""

from __future__ import annotations

import copy
import ctypes
import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from toolchain.core.errors import ToolchainError
from toolchain.families import Family
from toolchain.modeling.decoder import find_decoder_layers
from toolchain.modeling.filling import Filler, empty_model

Modules = Mapping[str, Mapping[str, str]]
"""Module of the checkpoint -> suffix -> tensor name."""


class Absent(nn.Module):
    """Stands where a part of the model is not in memory."""


class PassingLayer(nn.Module):
    """Stands for a decoder layer: hands its input on, and has the layer's attributes for the code around it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "_layer", layer)  # not a child: its parameters are not here

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            layer = object.__getattribute__(self, "_layer")
            value = getattr(layer, name)
            if isinstance(value, (nn.Module, torch.Tensor)):
                raise
            return value

    def __deepcopy__(self, memo: Any) -> PassingLayer:
        return PassingLayer(object.__getattribute__(self, "_layer"))

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return hidden_states


class LayeredModel:
    """Use ``layer`` and ``ends``; ``model`` holds what they made real."""

    def __init__(
        self,
        directory: Path,
        family: Family,
        modules: Modules,
        read: Callable[[str], torch.Tensor],
        *,
        device: torch.device,
        dtype: torch.dtype,
        trust_remote_code: bool = False,
    ) -> None:
        """``modules``: of the checkpoint in ``directory``; ``read``: one of its tensors, dequantized.

        ToolchainError TC-209 when the model has no list of decoder layers.
        """
        self.directory, self.family, self.device, self.dtype = directory, family, device, dtype
        self._read = read
        self.model = empty_model(directory, dtype, on_meta=True, trust_remote_code=trust_remote_code).eval()
        found = find_decoder_layers(self.model)
        if found is None:
            raise ToolchainError(
                f"{type(self.model).__name__} has no list of decoder layers",
                hint="--no-stream quantizes it in memory",
                code="TC-209",
            )
        self.prefix, layers = found
        self._templates = list(layers)
        self._layers = layers
        self._modules: dict[int | None, dict[str, Mapping[str, str]]] = {}
        for name, suffixes in modules.items():
            self._modules.setdefault(self.layer_of(family.to_module(name)), {})[name] = suffixes
        self._passing = [PassingLayer(layer) for layer in self._templates]
        self._put_layers({})

    def __len__(self) -> int:
        return len(self._templates)

    def layer_of(self, path: str) -> int | None:
        """Decoder layer of a module path; None for what lies before or behind them, and for extra layers."""
        if not path.startswith(f"{self.prefix}."):
            return None
        index = path.removeprefix(f"{self.prefix}.").partition(".")[0]
        return int(index) if index.isdecimal() and int(index) < len(self) else None

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """Decoder layer ``index`` with its weights; nothing else is there."""
        made = copy.deepcopy(self._templates[index])
        with self._only_layers():
            try:
                self._put_layers({index: made})
                self._fill(self._modules.get(index, {}), made, f"{self.prefix}.{index}")
                yield made.to(self.device)
            finally:
                self._put_layers({})
                empty(made)
                forget(self.model)

    @contextmanager
    def ends(self, *, head: bool) -> Iterator[Any]:
        """Embedding, final norm and, with ``head``, the output projection; layers hand their input on."""
        template = self.model
        self.model = made = copy.deepcopy(template)
        try:
            output = made.get_output_embeddings()
            if not head and output is not None:
                path = next(path for path, module in made.named_modules() if module is output)
                _replace(made, path, Absent())
            self._fill(self._modules.get(None, {}), made, "")
            yield made.to(self.device)
        finally:
            self.model = template
            empty(made)
            forget(template)

    @contextmanager
    def whole(self) -> Iterator[Any]:
        """The structure of the whole model, without weights."""
        self._put_layers(dict(enumerate(self._templates)))
        try:
            yield self.model
        finally:
            self._put_layers({})

    def _put_layers(self, real: Mapping[int, nn.Module]) -> None:
        for index, passing in enumerate(self._passing):
            self._layers[index] = real.get(index, passing)

    @contextmanager
    def _only_layers(self) -> Iterator[None]:
        """Whatever is not on the way to the list of layers is absent."""
        saved: list[tuple[nn.Module, str, nn.Module]] = []
        parent: nn.Module = self.model
        for step in self.prefix.split("."):
            for name, child in list(parent.named_children()):
                if name != step:
                    saved.append((parent, name, child))
                    setattr(parent, name, Absent())
            parent = parent.get_submodule(step)
        try:
            yield
        finally:
            for owner, name, child in saved:
                setattr(owner, name, child)

    def _fill(self, modules: Modules, part: nn.Module, path: str) -> None:
        """Read the tensors of ``part``, which lies at ``path``. ToolchainError TC-304 for holes and strangers."""
        filler = Filler(self.model, self.family, self.dtype)
        for name, suffixes in modules.items():
            if path or self._is_here(self.family.to_module(name)):
                filler.fill(name, {suffix: self._read(tensor) for suffix, tensor in suffixes.items()})
        if not path:
            self.model.tie_weights()
        filler.finish_part(self.directory, part)

    def _is_here(self, path: str) -> bool:
        """False for what the model has no place for: extra layers, towers, an absent output projection."""
        try:
            return not isinstance(self.model.get_submodule(path), Absent)
        except AttributeError:
            return False


def empty(part: nn.Module) -> None:
    """Its weights go, whoever still has the module."""
    for tensor in [*part.parameters(), *part.buffers()]:
        if not tensor.is_meta:
            tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)


def forget(model: Any) -> None:
    """ModelOpt's record of what it did to ``model`` goes, and memory that Python's cycles hold."""
    if hasattr(model, "_modelopt_state"):
        del model._modelopt_state
    gc.collect()
    _return_freed_pages()


def _return_freed_pages() -> None:
    """glibc keeps what was freed for the next tensors, which are seldom of the same sizes."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
