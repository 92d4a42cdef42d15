"""What a user asks of ``toolchain engine``: the options, or a YAML spec with the same names."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from toolchain.auto.candidates import AUTO, METHODS, Auto
from toolchain.auto.cost import COSTS
from toolchain.core.errors import UsageError
from toolchain.evaluate.gates import Gates, option
from toolchain.pipeline.training_request import TrainingRequest, read_training
from toolchain.plan.policy import PolicyOptions
from toolchain.plan.sparsity import sparsity_of
from toolchain.plan.steps import Sparsity
from toolchain.plan.types import Calibration, Serving
from toolchain.quantize.streaming.executor import ExecutorOptions
from toolchain.recipes import is_recipe_file

LEAST = {
    "calib_samples": 1,
    "calib_length": 1,
    "calib_max_samples": 1,
    "min_tokens_per_expert": 0,
    "eval_tokens": 2,
    "seed": 0,
    "eplb_slots": 0,
    "eplb_layer_updates": 0,
}
"""The smallest values that mean something; Python's generators take -1 for 1."""


def _takes_bool(kind: Any) -> bool:
    """True for bool and bool | None: Python takes True for a number otherwise."""
    return kind is bool or bool in get_args(kind)


def _absolute(source: str) -> str:
    """A local path made absolute, the name of a data set on the hub as it is."""
    local = Path(source).expanduser()
    return str(local.resolve()) if local.exists() else source


@dataclass(frozen=True, kw_only=True)
class EngineRequest:
    """Fields have the names of the command line's options."""

    model: str
    format: str | None = None
    """Required, except where a recipe file says it."""
    bits: float | int | None = None
    """Budget of ``--format auto``: most effective bits per parameter of the whole checkpoint."""
    auto_formats: str | list | tuple = ""
    """Candidates of ``--format auto``, as a list or separated by commas; empty: what the target runs best."""
    auto_method: str = METHODS[0]
    auto_cost: str = COSTS[0]
    policy: str | None = None
    attention: str = PolicyOptions.attention
    shared_experts: str = PolicyOptions.shared_experts
    lm_head: str = PolicyOptions.lm_head
    protect_first: int | None = PolicyOptions.protect_first
    protect_last: int = PolicyOptions.protect_last
    recipe: str | None = None
    sparsity: str | None = None
    """``2:4``; None: nothing is made sparse."""
    sparsity_method: str = Sparsity.method
    kv_cache: str = "none"
    gpu: str = "cpu"
    target: str = "local"
    trtllm_version: str | None = None
    tp: int = 1
    ep: int = 1
    pp: int = 1
    max_batch_size: int | None = None
    max_seq_len: int | None = None
    attention_dp: bool = False
    max_num_tokens: int = Serving.max_num_tokens
    chunked_prefill: bool = True
    moe_backend: str = ""
    eplb_slots: int = 0
    eplb_layer_updates: int = 0
    llm_args: dict | None = None
    """Further arguments of TensorRT-LLM's LLM API, such as speculative_config; they win over those of the plan."""
    calib_data: str | list | tuple = ""
    """A path or data set name, or several."""
    calib_samples: int = Calibration.samples
    calib_length: int = Calibration.length_tokens
    chat_template: bool = False
    calibrate_experts: str = Calibration.mode
    calibrate_topk_ratio: float | int | None = None
    min_tokens_per_expert: int = Calibration.min_tokens_per_expert
    calib_max_samples: int = Calibration.max_samples
    sampling: str = Calibration.sampling
    strict: bool = False
    allow_tf32: bool = False
    seed: int = 0
    stream: bool | None = None
    """Quantize shard by shard; None: where the whole model does not fit into memory."""
    executor: str = ExecutorOptions.name
    ray_address: str | None = None
    ray_cpus: int | None = None
    device: str = "auto"
    trust_remote_code: bool = False
    eval_data: str | None = None
    """Text to judge the engine on; None takes the model directory's evaluation.jsonl if there is one."""
    eval_tokens: int = 16_384
    max_kl: float | int | None = None
    max_ppl_increase: float | int | None = None
    min_top1: float | int | None = None
    min_router_agreement: float | int | None = None
    training: dict | None = None
    """What to train with fake quantization before the export, with the names of the options of ``toolchain qat``; None:
    nothing."""
    start: str | None = None
    """Engine directory whose calibration training starts from, and whose scales the student must have."""

    def __post_init__(self) -> None:
        """UsageError TC-007 for values of another type or range; limits of serving are findings of the plan."""
        problems = []
        for name, kind in get_type_hints(type(self)).items():
            value = getattr(self, name)
            if not isinstance(value, kind) or (isinstance(value, bool) and not _takes_bool(kind)):
                expected = getattr(kind, "__name__", str(kind))
                problems.append(f"{option(name)} is {value!r} (expected {expected})")
            elif name == "calib_data" and not all(isinstance(item, str) for item in value):
                problems.append(f"--calib-data is {value!r} (expected paths or data set names)")
            elif name in LEAST and value < LEAST[name]:
                problems.append(f"{option(name)} is {value} (expected at least {LEAST[name]})")
        if problems:
            raise UsageError("; ".join(problems), hint="`toolchain engine --help` lists them", code="TC-007")
        if self.format is None and not is_recipe_file(self.recipe):
            raise UsageError("--format is missing", hint="for example --format nvfp4", code="TC-101")
        if self.is_auto != (self.bits is not None) or (self.is_auto and is_recipe_file(self.recipe)):
            raise UsageError(
                f"--format {self.format} with --bits {self.bits} and --recipe {self.recipe}",
                hint="--format auto and --bits go together, as in --format auto --bits 5.0, and with no recipe file",
                code="TC-170",
            )
        self.executor_options()
        self._check_training()
        if self.sparsity_options() is not None and self.is_auto:
            raise UsageError(
                "--sparsity with --format auto: what is measured to choose formats are dense matrices",
                hint="name the format",
                code="TC-265",
            )

    def _check_training(self) -> None:
        """UsageError TC-191 for ways of quantizing that never hold the whole model, TC-196 for a start of nothing."""
        if self.training_options() is None:
            if self.start is not None:
                raise UsageError("--start without training", hint="add training: to the spec", code="TC-196")
            return
        if self.stream or self.executor != ExecutorOptions.name:
            raise UsageError(
                "--stream and --executor ray with training: it holds the whole model in memory",
                hint="leave them out; --parallel fsdp2 cuts it over several devices",
                code="TC-191",
            )

    def training_options(self) -> TrainingRequest | None:
        """What is asked of training. UsageError TC-007 for unknown keys and values of another type."""
        return None if self.training is None else read_training(self.training)

    @property
    def is_auto(self) -> bool:
        return self.format == AUTO

    def auto(self) -> Auto:
        """The search that ``--format auto`` asks for. UsageError TC-170 for values that make no sense."""
        names = self.auto_formats.split(",") if isinstance(self.auto_formats, str) else self.auto_formats
        formats = tuple(filter(None, (str(name).strip() for name in names)))
        return Auto(bits=float(self.bits or 0), formats=formats, method=self.auto_method, cost=self.auto_cost)

    def policy_options(self) -> PolicyOptions:
        """UsageError TC-158 for values that do not exist."""
        return PolicyOptions(**{item.name: getattr(self, item.name) for item in fields(PolicyOptions)})

    def sparsity_options(self) -> Sparsity | None:
        """UsageError TC-265 for values that do not exist."""
        return sparsity_of(self.sparsity, self.sparsity_method)

    def gates(self) -> Gates:
        """UsageError TC-530 for limits that no measurement can be compared with."""
        return Gates(**{item.name: getattr(self, item.name) for item in fields(Gates)})

    def executor_options(self) -> ExecutorOptions:
        """UsageError TC-236 for options that do not go together."""
        options = ExecutorOptions(name=self.executor, ray_address=self.ray_address, ray_cpus=self.ray_cpus)
        options.wish(self.stream)
        return options

    def engine_name(self, model: str = "") -> str:
        """``<model>-<format>``, with target and GPU when the engine is not the local one. ``model``: another name for
        it than its directory's or its id."""
        base = Path(self.model).expanduser().resolve().name if Path(self.model).exists() else self.model
        base = model or base
        name = base.replace("/", "--") + (f"-{self.format}" if self.format else "")
        if self.is_auto:
            asked = self.auto()
            said = [asked.method] * (asked.method != METHODS[0]) + [asked.cost] * (asked.cost != COSTS[0])
            name += "-" + "-".join([f"{asked.bits:g}", *asked.formats, *said])
        name += f"-kv_{self.kv_cache}" if self.kv_cache != "none" else ""
        name += f"-{self.policy}" if self.policy else ""
        for key, value in self.policy_options().said.items():
            name += f"-{key}_{value}"
        recipe = Path(self.recipe).stem if self.recipe and is_recipe_file(self.recipe) else self.recipe
        name += f"-{recipe}" if recipe else ""
        if self.sparsity:
            name += f"-{self.sparsity}" + f"-{self.sparsity_method}" * (
                self.sparsity_method != Sparsity.method
            )
        trained = self.training_options()
        name += trained.suffix if trained else ""
        name += f"-{self.target}-{self.gpu}" if self.target != "local" else ""
        return re.sub(r"[^A-Za-z0-9._-]+", "-", name).lower()

    def calibration(self) -> Calibration:
        """Paths are made absolute: the plan must mean the same wherever it is read.

        UsageError TC-160 for a ratio without the mode that takes one, and the reverse; the plan checks the rest.
        """
        if (self.calibrate_topk_ratio is None) == (self.calibrate_experts == "topk"):
            raise UsageError(
                f"--calibrate-experts {self.calibrate_experts} with --calibrate-topk-ratio {self.calibrate_topk_ratio}",
                hint="give both, as in --calibrate-experts topk --calibrate-topk-ratio 0.5, or neither",
                code="TC-160",
            )
        given = [self.calib_data] if isinstance(self.calib_data, str) else list(self.calib_data)
        sources = [_absolute(source) for source in given if source]
        return Calibration(
            data=tuple(sources) if len(sources) > 1 else "".join(sources),
            samples=self.calib_samples,
            length_tokens=self.calib_length,
            seed=self.seed,
            chat_template=self.chat_template,
            mode=self.calibrate_experts,
            topk_ratio=1.0 if self.calibrate_topk_ratio is None else float(self.calibrate_topk_ratio),
            min_tokens_per_expert=self.min_tokens_per_expert,
            max_samples=self.calib_max_samples,
            sampling=self.sampling,
            strict=self.strict,
            allow_tf32=self.allow_tf32,
        )


def read_spec(path: Path, overrides: dict[str, Any]) -> EngineRequest:
    """An engine spec (``engines/*.yaml``); options given on the command line win. UsageError names unknown keys."""
    import yaml

    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid YAML: {error}", code="TC-007") from error
    if not isinstance(value, dict):
        raise UsageError(f"{path} holds {type(value).__name__}, expected a mapping of options", code="TC-007")
    known = {item.name for item in fields(EngineRequest)}
    values = {str(key).replace("-", "_"): item for key, item in value.items()}
    unknown = [_nearest(key, known) for key in sorted(set(values) - known)]
    required = {"model"} if is_recipe_file({**values, **overrides}.get("recipe")) else {"model", "format"}
    missing = sorted(required - set(values) - set(overrides))
    if unknown or missing:
        raise UsageError(
            "; ".join(
                [
                    *([f"{path}: unknown keys {', '.join(unknown)}"] if unknown else []),
                    *([f"{path}: missing keys {', '.join(missing)}"] if missing else []),
                ]
            ),
            hint=f"known keys: {', '.join(sorted(known))}",
            code="TC-007",
        )
    return EngineRequest(**{**values, **overrides})


def _nearest(key: str, known: set[str]) -> str:
    found = difflib.get_close_matches(key, known, n=1)
    return f"{key} (did you mean {found[0]}?)" if found else key
