"""The same tasks on TensorRT-LLM: command lines for the machine that serves the engine.

Nothing is run here: TensorRT-LLM needs its own environment (it pins other versions of ModelOpt and transformers).
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from toolchain.core.files import read_json
from toolchain.runtime.location import locate

TRTLLM_EVAL = {
    "gsm8k": "gsm8k",
    "mmlu": "mmlu",
    "gpqa_diamond_cot_zeroshot": "gpqa_diamond",
    "gpqa_main_cot_zeroshot": "gpqa_main",
    "gpqa_extended_cot_zeroshot": "gpqa_extended",
    "cnn_dailymail": "cnn_dailymail",
}
"""Task of the harness -> subcommand of ``trtllm-eval`` (TensorRT-LLM 1.0 to 1.2: ``commands/eval.py``)."""
HARNESS_NOTE = (
    "lm_eval >= 0.4.12 has a TensorRT-LLM model (`--model trtllm`); tasks that score given answers need TensorRT-LLM "
    ">= 1.3.0rc11, prompts beyond max_input_len lose their beginning; run a model whose figures you know first"
)
EVAL_NOTE = (
    "trtllm-eval takes the engine's own llm_args.yaml; its prompts differ from the harness's, so compare it with "
    "itself on the source model only"
)


def trtllm_commands(
    directory: Path,
    tasks: Sequence[str],
    *,
    include_path: Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    chat_template: bool = False,
) -> list[dict[str, Any]]:
    """Command lines with ``tool``, ``command``, ``tasks`` and ``note``: the harness over TensorRT-LLM for all tasks,
    ``trtllm-eval`` for those that it has. Parallelism and limits are the engine's; 1 and defaults for a checkpoint."""
    location = locate(directory)
    manifest = read_json(directory / "engine.json") if (directory / "engine.json").is_file() else {}
    parallel = {"tp": 1, "ep": 1, "pp": 1, **manifest.get("parallel", {})}
    limits = manifest.get("limits", {})
    checkpoint = str(location.checkpoint)
    found = [
        {
            "tool": "lm_eval",
            "tasks": list(tasks),
            "command": _harness(
                checkpoint, tasks, parallel, limits, include_path, limit, num_fewshot, chat_template
            ),
            "note": HARNESS_NOTE,
        }
    ]
    for task in tasks:
        if task in TRTLLM_EVAL:
            command = _trtllm_eval(checkpoint, task, parallel, directory / "llm_args.yaml", limit)
            found.append({"tool": "trtllm-eval", "tasks": [task], "command": command, "note": EVAL_NOTE})
    return found


def _harness(
    checkpoint: str,
    tasks: Sequence[str],
    parallel: dict[str, int],
    limits: dict[str, int],
    include_path: Path | None,
    limit: int | None,
    num_fewshot: int | None,
    chat_template: bool,
) -> str:
    model = {
        "model": checkpoint,
        "tensor_parallel_size": parallel["tp"],
        "pipeline_parallel_size": parallel["pp"],
    }
    if limits:
        answer = min(512, limits["max_seq_len"] // 2)  # the backend's own default, where that fits
        model |= {
            "max_batch_size": limits["max_batch_size"],
            "max_input_len": limits["max_seq_len"] - answer,
            "max_output_len": answer,
        }
    words = ["lm_eval", "--model", "trtllm"]
    words += ["--model_args", ",".join(f"{key}={value}" for key, value in model.items())]
    words += ["--tasks", ",".join(tasks)]
    if include_path is not None:
        words += ["--include_path", str(include_path)]
    if num_fewshot is not None:
        words += ["--num_fewshot", str(num_fewshot)]
    if limit is not None:
        words += ["--limit", str(limit)]
    if chat_template:
        words += ["--apply_chat_template", "--fewshot_as_multiturn"]
    return shlex.join(words)


def _trtllm_eval(
    checkpoint: str, task: str, parallel: dict[str, int], arguments: Path, limit: int | None
) -> str:
    words = ["trtllm-eval", "--model", checkpoint, "--backend", "pytorch"]
    words += ["--tp_size", str(parallel["tp"]), "--pp_size", str(parallel["pp"])]
    if parallel["ep"] > 1:
        words += ["--ep_size", str(parallel["ep"])]
    if arguments.is_file():
        words += ["--extra_llm_api_options", str(arguments)]
    words.append(TRTLLM_EVAL[task])
    if limit is not None:
        words += ["--num_samples", str(limit)]
    return shlex.join(words)
