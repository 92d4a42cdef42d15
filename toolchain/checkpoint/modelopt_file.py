"""ModelOpt's conversion of quantization configs, without ModelOpt's packages.

Importing the package that it lies in takes seven seconds and 350 MB: more than quantizing a small model does. The file
itself imports nothing of them (ModelOpt 0.47).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

NAME = "modelopt.torch.export.convert_hf_config"


@functools.cache
def conversion() -> ModuleType:
    """The module with ``convert_hf_quant_config_format``; the installed package's own when that is loaded already."""
    if NAME not in sys.modules:
        import modelopt

        path = Path(modelopt.__file__).parent.joinpath(*NAME.split(".")[1:]).with_suffix(".py")
        spec = (
            importlib.util.spec_from_file_location(f"{__name__}.{path.stem}", path)
            if path.is_file()
            else None
        )
        if spec is not None and spec.loader is not None:
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            return module
    return importlib.import_module(NAME)
