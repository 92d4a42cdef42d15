"""An engine as the start of training: its model, its plan and its calibration, exactly."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from toolchain.core.errors import ToolchainError, UsageError
from toolchain.core.files import read_json
from toolchain.pipeline.inputs import CALIBRATION_FILE, model_files, texts_identity
from toolchain.pipeline.request import EngineRequest
from toolchain.plan.choices import overrides_of
from toolchain.plan.policy import CUSTOM, PolicyOptions
from toolchain.plan.types import Calibration, Plan, Serving

PLAN, CHECKPOINT = "plan.json", "checkpoint"
MODEL_FILE = "model file "
"""How the record of the quantize stage names the hashes of the model's files."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """An engine that training starts from."""

    directory: Path
    plan: Plan
    settings: dict[str, Any] = field(repr=False)
    """What its quantize stage was asked; empty where there is no record."""
    judged: dict[str, Any] = field(repr=False)
    """The same of its evaluate stage."""

    @property
    def checkpoint(self) -> Path:
        return self.directory / CHECKPOINT

    def options(self) -> dict[str, Any]:
        """Fields of ``EngineRequest`` that ask for this engine again."""
        plan, named = self.plan, not (self.plan.auto or self.plan.policy == CUSTOM.name)
        options = {item.name: getattr(plan.policy_options, item.name) for item in fields(PolicyOptions)}
        serving = {item.name: getattr(plan.serving, item.name) for item in fields(Serving)}
        return {
            "model": plan.model,
            "format": plan.format,
            **({"policy": plan.policy, **options} if named else {}),
            "recipe": plan.recipe,
            "kv_cache": plan.kv_cache,
            **({"sparsity": plan.sparsity.pattern, "sparsity_method": plan.sparsity.method} if plan.sparsity else {}),
            "gpu": plan.gpu,
            "target": plan.target,
            "trtllm_version": plan.target_version or None,
            **serving,
            **_calibration_options(plan.calibration),
            "device": str(self.settings.get("device", "auto")),
            **({"eval_data": self.judged["data"]} if self.judged.get("data") else {}),
            **({"eval_tokens": self.judged["tokens"]} if self.judged.get("tokens") else {}),
        }  # fmt: skip

    def asks_for(self, request: EngineRequest) -> bool:
        """Whether ``request`` stores the same numbers as this engine: nothing of what decides them was overridden."""
        names = (
            "format",
            "policy",
            *(item.name for item in fields(PolicyOptions)),
            "recipe",
            "kv_cache",
            "sparsity",
        )
        asked = self.options()
        plain = EngineRequest(model=request.model, format=request.format)
        return all(getattr(request, name) == asked.get(name, getattr(plain, name)) for name in names)

    def named(self, again: Plan) -> Plan:
        """``again``, a plan by this engine's decisions one by one, under the names that the engine gave them."""
        return replace(
            again, policy=self.plan.policy, policy_options=self.plan.policy_options, auto=self.plan.auto
        )

    def numbers(self) -> dict[str, Any]:
        """Arguments of ``make_plan`` that repeat what this engine stores."""
        plan = self.plan
        return {
            "format": plan.format,
            "policy": CUSTOM.name,
            "overrides": overrides_of(plan),
            "recipe": plan.recipe,
            "kv_cache": plan.kv_cache,
            "sparsity": plan.sparsity,
        }


def find_start(model: str) -> Path | None:
    """The engine directory that ``model`` names; None for a model, a hub id or a spec."""
    path = Path(model).expanduser()
    is_engine = (path / PLAN).is_file() and not (path / "config.json").is_file()
    return path.resolve() if is_engine else None


def read_start(directory: Path) -> Start:
    """The engine in ``directory``. UsageError TC-197 when training cannot start from it, with what can be done."""
    try:
        plan = Plan.from_json(read_json(directory / PLAN))
    except (KeyError, TypeError) as error:
        raise _unfit(directory, f"its {PLAN} cannot be read: {error}", "make the engine again") from error
    if plan.training is not None:
        trained = directory / "trained"
        raise _unfit(
            directory,
            "it was trained already, from another engine or model",
            f"train on from its weights: `toolchain qat {shlex.quote(str(trained))} --format {plan.format} ...`",
        )
    if not (directory / CHECKPOINT).is_dir():
        raise _unfit(
            directory, "it has no checkpoint, so its calibration is not known", "give the MODEL instead"
        )
    if Path(plan.model).is_absolute() and not Path(plan.model).is_dir():
        raise _unfit(directory, f"its model {plan.model} is gone", "put it back, or give a MODEL instead")
    return Start(
        directory=directory,
        plan=plan,
        settings=_settings(directory, "quantize"),
        judged=_settings(directory, "evaluate"),
    )


def changed_numbers(start: Start, plan: Plan) -> list[str]:
    """What ``plan`` stores otherwise than the engine does, or calibrates otherwise: then nothing can be compared."""
    from toolchain.qat.identity import settings_of

    before, now = settings_of(start.plan), settings_of(plan)
    names = {"assignments_sha256": "formats of parts"}
    return [names.get(key, key) for key in now if before.get(key) != now[key] and key != "model_identity"]


def require_same_inputs(start: Start, info_identity: str, source: Path) -> None:
    """UsageError TC-197 unless the model, byte by byte, and the calibration text are still those of the engine."""
    directory, settings = start.directory, start.settings
    if info_identity != start.plan.model_identity:
        raise _unfit(
            directory, f"{source} is not the model that it was made of", "give that model's directory"
        )
    now = model_files(source, directory / "stages" / "inputs" / "model.json")
    before = {
        key.removeprefix(MODEL_FILE): digest for key, digest in settings.items() if key.startswith(MODEL_FILE)
    }
    changed = (
        sorted(name for name in {**before, **now} if before.get(name) != now.get(name)) if before else []
    )
    if changed:
        raise _unfit(
            directory,
            f"{', '.join(changed[:3])} of {source} changed since",
            "make the engine again, or give the MODEL",
        )
    sources = start.plan.calibration.sources or (str(source / CALIBRATION_FILE),)
    found = texts_identity([Path(item) for item in sources])
    if settings.get("calibration.file") != found and settings:
        what = (
            "is gone"
            if found is None or not all(Path(item).exists() for item in sources)
            else "changed since"
        )
        raise _unfit(
            directory,
            f"its calibration text {', '.join(sources)} {what}",
            "put it back, or give the MODEL and --calib-data, which calibrates anew",
        )


def _calibration_options(made: Calibration) -> dict[str, Any]:
    return {
        "calib_data": made.data,
        "calib_samples": made.samples,
        "calib_length": made.length_tokens,
        "chat_template": made.chat_template,
        "calibrate_experts": made.mode,
        "calibrate_topk_ratio": made.topk_ratio if made.mode == "topk" else None,
        "min_tokens_per_expert": made.min_tokens_per_expert,
        "calib_max_samples": made.max_samples,
        "sampling": made.sampling,
        "strict": made.strict,
        "allow_tf32": made.allow_tf32,
        "seed": made.seed,
    }


def _settings(directory: Path, stage: str) -> dict[str, Any]:
    path = directory / "stages" / f"{stage}.json"
    if not path.is_file():
        return {}
    try:
        value = read_json(path).get("settings")
    except ToolchainError:
        return {}
    return value if isinstance(value, dict) else {}


def _unfit(directory: Path, reason: str, hint: str) -> UsageError:
    return UsageError(f"training cannot start from {directory}: {reason}", hint=hint, code="TC-197")
