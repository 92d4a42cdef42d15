"""The stages that judge the written bytes: audit, evaluation, gates."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from toolchain.checkpoint.audit.runtime import runtime_of
from toolchain.core.errors import FindingsError, UsageError
from toolchain.data.texts import read_texts
from toolchain.evaluate import gates
from toolchain.pipeline.inputs import EVALUATION_FILE, text_identity
from toolchain.pipeline.request import EngineRequest
from toolchain.pipeline.workspace import Workspace
from toolchain.plan.types import Plan

PARTIAL = Path("stages") / "evaluate.partial"
"""What an evaluation that was killed has measured so far, in the engine's directory."""


def headline(metrics: dict[str, Any]) -> dict[str, Any]:
    """What a manifest repeats of metrics.json: single figures, their intervals and what they were measured on."""
    kept = ("data", "intervals")
    return {key: value for key, value in metrics.items() if key in kept or not isinstance(value, list | dict)}


def held_out_text(request: EngineRequest, source: Path) -> Path | None:
    """``--eval-data``, else what the model's directory brings along, if anything."""
    if request.eval_data:
        return Path(request.eval_data).expanduser().resolve()
    own = source / EVALUATION_FILE
    return own if own.is_file() else None


def require_judgeable(request: EngineRequest, plan: Plan, source: Path) -> None:
    """Before any work: text that cannot be read, and gates that could never be judged, are refused (TC-530)."""
    data = held_out_text(request, source)
    if data is not None:
        next(iter(read_texts(data)))
    asked = request.gates().asked
    if asked and data is None:
        raise UsageError(
            f"{', '.join(map(gates.option, asked))}: there is no held-out text to judge on",
            hint=f"give --eval-data a text or JSONL file, or put {EVALUATION_FILE} into the model's directory",
            code="TC-530",
        )
    is_moe = any(item.role == "routed_expert" for item in plan.assignments)
    if "min_router_agreement" in asked and not is_moe:
        raise UsageError(
            f"--min-router-agreement: {plan.architecture} has no routed experts",
            hint="leave it out for dense models",
            code="TC-530",
        )


@dataclass
class Judging:
    """Judges the checkpoint of ``workspace`` against the model at ``source``."""

    workspace: Workspace
    request: EngineRequest
    plan: Plan
    source: Path
    identity: dict[str, Any]
    """Hashes of the checkpoint and of the source."""
    trained: Path | None = None
    """The trained model that was packed; None: the source itself was. The audit compares with it, while the evaluation
    asks how far all of it is from the source."""
    trained_identity: str | None = None

    def verify(self) -> dict[str, Any]:
        runtime = runtime_of(self.plan)
        settings = {**self.identity, "runtime": None if runtime is None else asdict(runtime)}
        if self.trained_identity:
            settings["trained"] = self.trained_identity
        return self.workspace.stage("verify", settings, ("verify.json",), self._verify)

    def evaluate(self) -> dict[str, Any]:
        return self.workspace.stage(
            "evaluate", {**self.identity, **self._data()}, ("metrics.json",), self._evaluate
        )

    def gates(self, record: dict[str, Any]) -> tuple[gates.Judged, ...]:
        """Judge what ``record`` (of ``evaluate``) measured, mark the engine, and return the gates that stand.

        Cheap, so it is done at each run: a limit may change, a mark may have been removed.
        """
        judged = gates.judge(record["facts"], self.request.gates())
        return gates.mark(self.workspace.directory, judged, checkpoint=self.identity["checkpoint"])

    @cached_property
    def data(self) -> Path | None:
        return held_out_text(self.request, self.source)

    def _data(self) -> dict[str, Any]:
        return {
            "data": str(self.data) if self.data else None,
            "data_file": text_identity(self.data),
            "tokens": self.request.eval_tokens,
            "device": self.request.device,
        }

    def _verify(self) -> dict[str, Any]:
        from toolchain.checkpoint.audit import audit

        checkpoint = self.workspace.directory / "checkpoint"
        verdict = audit(
            checkpoint,
            against=self.trained or self.source,
            target=runtime_of(self.plan),
            progress=self.workspace.progress,
        )
        self.workspace.write("verify.json", verdict.to_json())
        if not verdict.passed:
            raise FindingsError(
                f"the written checkpoint {checkpoint} failed its audit",
                verdict.findings,
                hint="nothing is built from it; `toolchain explain CODE` tells more about each finding",
                code="TC-402",
            )
        return verdict.facts

    def _evaluate(self) -> dict[str, Any]:
        if self.data is None:
            self.workspace.progress.note(
                "evaluate: no held-out text (--eval-data): the engine's quality is not measured"
            )
            metrics: dict[str, Any] = {"measured": False}
        else:
            from toolchain.evaluate.checkpoint import evaluate_checkpoint

            metrics = evaluate_checkpoint(
                self.workspace.directory / "checkpoint",
                baseline=self.source,
                data=self.data,
                max_tokens=self.request.eval_tokens,
                device=self.request.device,
                state=self.workspace.directory / PARTIAL,
                progress=self.workspace.progress,
            )
            metrics["measured"] = True
        self.workspace.write("metrics.json", metrics)
        return headline(metrics)
