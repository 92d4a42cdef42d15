"""Which GPUs an instance of the model has: the parameter gpu_device_ids of config.pbtxt, such as ``0;1``."""

import json
import os

import triton_python_backend_utils as pb_utils


def choose_gpus(args):
    """Set CUDA_VISIBLE_DEVICES of this stub, which the engine process inherits; nothing where no GPUs are named.

    Raises TritonModelException for an instance that has none.
    """
    parameters = json.loads(args.get("model_config") or "{}").get("parameters", {})
    lists = parameters.get("gpu_device_ids", {}).get("string_value", "")
    if not lists:
        return
    groups = lists.split(";")
    suffix = args.get("model_instance_name", "").rsplit("_", 1)[-1]
    index = int(suffix) if suffix.isdigit() else 0
    if index >= len(groups):
        raise pb_utils.TritonModelException(f"gpu_device_ids {lists!r} has no entry for instance {index}")
    os.environ["CUDA_VISIBLE_DEVICES"] = groups[index].replace(" ", "")
