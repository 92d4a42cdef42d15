"""Options that say what an engine is planned for: GPU, target, parallelism, limits, arguments of the LLM API."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from toolchain.cli.options import stack
from toolchain.core.errors import UsageError
from toolchain.core.gpus import GPUS
from toolchain.plan.types import Serving


class MappingFile(click.ParamType):
    """A YAML file that holds a mapping."""

    name = "file"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dict[str, Any]:
        """The mapping. UsageError TC-007 for a file that is absent, no YAML or something else."""
        import yaml

        if isinstance(value, dict):
            return value
        path = Path(value)
        if not path.is_file():
            raise UsageError(f"{path} does not exist", hint="give a YAML file", code="TC-007")
        try:
            found = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UsageError(f"{path} is not valid YAML: {error}", code="TC-007") from error
        if not isinstance(found, dict):
            raise UsageError(
                f"{path} holds {type(found).__name__}, expected a mapping of arguments", code="TC-007"
            )
        return found


def llm_api_options(*, planned: bool = False) -> Any:
    """Options of target trtllm. ``planned``: what is not given stays as an earlier plan has it."""

    def default(value: Any) -> Any:
        return None if planned else value

    shown = not planned
    return stack(
        click.option(
            "--attention-dp/--no-attention-dp",
            default=default(Serving.attention_dp),
            help="Attention data parallelism: each rank of --tp attends to requests of its own, with all heads; "
            "--max-batch-size then counts per rank.",
        ),
        click.option(
            "--max-num-tokens",
            type=int,
            default=default(Serving.max_num_tokens),
            show_default=shown,
            help="Tokens of one step.",
        ),
        click.option(
            "--chunked-prefill/--no-chunked-prefill",
            default=default(Serving.chunked_prefill),
            show_default=shown,
            help="Prefill prompts longer than --max-num-tokens in several steps.",
        ),
        click.option(
            "--moe-backend",
            default=default(Serving.moe_backend),
            help="moe_config.backend, such as CUTLASS. Default: by format, GPU and release (`toolchain support`).",
        ),
        click.option(
            "--eplb-slots",
            type=int,
            default=default(Serving.eplb_slots),
            help="Expert load balancing: slots of a layer over all ranks of --ep, replicas of busy experts included.",
        ),
        click.option(
            "--eplb-layer-updates",
            type=int,
            default=default(Serving.eplb_layer_updates),
            help="Layers whose experts are placed anew in each iteration. Default: the placement stays.",
        ),
        click.option(
            "--llm-args",
            type=MappingFile(),
            help="YAML file with further arguments of TensorRT-LLM's LLM API, such as speculative_config; they win.",
        ),
    )


placement_options = stack(
    click.option(
        "--gpu", default="cpu", show_default=True, help=f"One of {', '.join(gpu.name for gpu in GPUS)}."
    ),
    click.option(
        "--target", default="local", show_default=True, help="What runs the engine: local or trtllm."
    ),
    click.option(
        "--trtllm-version", help="TensorRT-LLM release to plan for. Default: the latest stable one."
    ),
    click.option("--tp", type=int, default=1, show_default=True, help="Tensor parallel size."),
    click.option("--ep", type=int, default=1, show_default=True, help="Expert parallel size (divides --tp)."),
    click.option("--pp", type=int, default=1, show_default=True, help="Pipeline parallel size."),
    click.option("--max-batch-size", type=int, help="Requests at once. Default 8."),
    click.option(
        "--max-seq-len", type=int, help="Tokens of prompt and answer. Default 4096, or the model's limit."
    ),
    llm_api_options(),
)
