"""The decoder's layers, whatever an architecture calls the list."""

from __future__ import annotations

from typing import Any

from torch import nn


def find_decoder_layers(model: Any) -> tuple[str, nn.ModuleList] | None:
    """(module path, list) of the first ``*layers`` with ``num_hidden_layers`` entries; None without one."""
    count = model.config.get_text_config().num_hidden_layers
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and path.endswith("layers") and len(module) == count:
            return path, module
    return None
