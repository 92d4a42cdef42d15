"""What both Triton targets send: the inputs of a request by the names that the model has."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Collection
from dataclasses import dataclass, replace
from typing import Any

from toolchain.bench.targets.base import About, Piece, Request, RequestError, TargetSpec, ask_once, unusable
from toolchain.triton.contract import INPUTS

TYPES = {tensor.name: tensor.data_type.removeprefix("TYPE_") for tensor in INPUTS} | {
    "max_tokens": "INT32",
    "stream": "BOOL",
    "random_seed": "UINT64",
    "end_id": "INT32",
}
"""Input -> its type; the last four are those of the ensemble of ``inflight_batcher_llm``."""
TOKEN_COUNTS = ("return_num_input_tokens", "return_num_output_tokens")


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """The layout of one model."""

    names: frozenset[str]
    """Inputs that the model has."""
    token_counts: bool
    """Whether it is asked how many tokens prompt and answer had."""

    @property
    def usable(self) -> bool:
        return {"text_input", "sampling_param_max_tokens"} <= self.names or {
            "text_input",
            "max_tokens",
        } <= self.names

    @property
    def offers_counts(self) -> bool:
        return set(TOKEN_COUNTS) <= self.names

    def values(self, request: Request, spec: TargetSpec) -> dict[str, Any]:
        """Input -> value."""
        if "sampling_param_max_tokens" not in self.names:
            found: dict[str, Any] = {
                "max_tokens": request.max_tokens,
                "stream": True,
                "random_seed": spec.seed,
            }
            if spec.ignore_eos:
                found["end_id"] = -1
            found = {name: value for name, value in found.items() if name in self.names}
        else:
            found = {"streaming": True, "sampling_param_max_tokens": request.max_tokens}
            found["sampling_param_seed"] = spec.seed
            if spec.ignore_eos and "sampling_param_ignore_eos" in self.names:
                found["sampling_param_ignore_eos"] = True
            if self.token_counts:
                found |= dict.fromkeys(TOKEN_COUNTS, True)
        return {**found, "text_input": request.prompt}

    def notes(self, spec: TargetSpec) -> tuple[str, ...]:
        """What the model cannot be asked for."""
        if spec.ignore_eos and not {"sampling_param_ignore_eos", "end_id"} & self.names:
            return (
                "the model cannot be asked to ignore its end token: answers may be shorter than asked for",
            )
        return ()


class TritonTarget(ABC):
    """What HTTP and gRPC have in common."""

    def __init__(self, spec: TargetSpec) -> None:
        self.spec = spec
        self.inputs = Inputs(names=frozenset(), token_counts=False)

    async def settle(self, names: Collection[str]) -> None:
        """Find out how a model with these inputs is asked, and ask it once.

        A model that declares token counts and refuses them is asked without. ToolchainError TC-702 when it answers
        neither.
        """
        found = Inputs(names=frozenset(names), token_counts=False)
        if not found.usable:
            reason = f"{self.spec.model} has no inputs text_input and (sampling_param_)max_tokens"
            raise unusable(self.spec.url, reason)
        refused: RequestError | None = None
        for counts in (True, False) if found.offers_counts else (False,):
            self.inputs = replace(found, token_counts=counts)
            try:
                await ask_once(self, self.spec.url)
            except RequestError as error:
                refused = refused or error
            else:
                return
        raise unusable(self.spec.url, str(refused)) from refused

    @abstractmethod
    async def prepare(self) -> About: ...

    @abstractmethod
    def send(self, request: Request) -> AsyncIterator[Piece]: ...

    @abstractmethod
    async def close(self) -> None: ...
