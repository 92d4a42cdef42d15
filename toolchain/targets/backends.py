"""MoE backends: which of them runs a format on a GPU in one release, and which one is chosen."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from toolchain.core.errors import UsageError
from toolchain.targets.base import Target
from toolchain.targets.rows import REFERENCE, Row, State, best, by_backend, by_merit
from toolchain.targets.sources import MOE_GUIDE


@dataclass(frozen=True, kw_only=True)
class BackendState:
    """What one MoE backend does with one format on one SM."""

    name: str
    state: State
    preferred: bool
    """True for the one that is chosen when nobody asks for another."""
    reason: str
    """Why it is limited or does not run; empty for one without limits."""
    source: str

    def to_json(self) -> dict[str, object]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What the engine asks of a MoE backend beside the format."""

    backend: str = ""
    """Value of ``moe_config.backend`` that the user wants; empty: any."""
    ep: int = 1
    attention_dp: bool = False
    eplb: bool = False
    """Expert load balancing."""


NO_WISH = Wish()


def backend_states(target: Target, version: str, sm: int, format_name: str) -> tuple[BackendState, ...]:
    """Every MoE backend of the release, in the order of its documents, with state, reason and source."""
    line = target.line(version)
    if line is None:
        return ()
    rows = {row.backend: row for row in by_backend(_rows(target, version, sm, format_name))}
    return tuple(_state(name, rows.get(name), format_name, sm) for name in line.backends)


def _state(name: str, row: Row | None, format_name: str, sm: int) -> BackendState:
    if row is None:
        reason = f"no kernels for {format_name} on SM{sm}"
        return BackendState(name=name, state="no", preferred=False, reason=reason, source=MOE_GUIDE)
    return BackendState(
        name=name, state=row.state, preferred=row.preferred, reason=row.note, source=row.source
    )


def _rows(target: Target, version: str, sm: int, format_name: str) -> list[Row]:
    return target.rows_for(format_name=format_name, sm=sm, model="moe", version=version)


def refusal(target: Target, version: str, row: Row, wish: Wish) -> str:
    """Why the backend of ``row`` does not do what is wished for; empty when it does."""
    line = target.line(version)
    if row.state == "no":
        return row.note
    if wish.ep > 1 and not row.ep:
        return "it does not run with expert parallelism"
    if wish.attention_dp and not row.attention_dp:
        return "it does not run behind attention data parallelism"
    if wish.eplb and line and row.backend not in line.eplb:
        return f"it has no expert load balancing ({line.eplb_source})"
    return ""


def fitting(target: Target, version: str, sm: int, format_name: str, wish: Wish) -> list[Row]:
    """Rows of the backends that do what is wished for, whichever name is wished for; the reference left out."""
    rows = by_backend(_rows(target, version, sm, format_name))
    return by_merit(
        row for row in rows if row.backend != REFERENCE and not refusal(target, version, row, wish)
    )


def choose_backend(
    target: Target, version: str, sm: int, format_name: str, wish: Wish = NO_WISH
) -> tuple[str, str]:
    """(``moe_config.backend``, reason to write beside it). UsageError TC-120 or TC-129 when none does what is asked."""
    rows = {row.backend: row for row in by_backend(_rows(target, version, sm, format_name))}
    wanted = wish.backend.upper()
    if wanted and wanted != "AUTO":
        found = rows.get(wanted)
        problem = (
            refusal(target, version, found, wish)
            if found
            else missing(target, version, wanted, format_name, sm)
        )
        if found is None or problem:
            raise UsageError(
                f"moe_config.backend {wanted}: {problem}",
                hint=hint(target, version, sm, format_name, wish),
                code="TC-129",
            )
        return wanted, f"asked for; {_why(target, version, found, format_name, sm)}"
    chosen = best(fitting(target, version, sm, format_name, wish))
    if chosen is None:
        code = "TC-129" if best(rows.values()) else "TC-120"
        what = "does what is asked for with" if best(rows.values()) else "runs"
        raise UsageError(
            f"no MoE backend of TensorRT-LLM {version} {what} {format_name} on SM{sm}",
            hint=hint(target, version, sm, format_name, wish),
            code=code,
        )
    return chosen.backend, _why(target, version, chosen, format_name, sm)


def missing(target: Target, version: str, name: str, format_name: str, sm: int) -> str:
    """Why a backend has no row: unknown to the release, or without kernels."""
    line = target.line(version)
    if line and name not in line.backends:
        later = next((item for item in target.lines if name in item.backends and item.key > line.key), None)
        since = f" (it is in {later.name})" if later else ""
        return f"TensorRT-LLM {version} does not know it{since}"
    return f"it has no kernels for {format_name} on SM{sm} in TensorRT-LLM {version}"


def hint(target: Target, version: str, sm: int, format_name: str, wish: Wish) -> str:
    """The backends that do, or what to give up."""
    names = [row.backend for row in fitting(target, version, sm, format_name, wish)]
    if names:
        return f"use {' or '.join(names)}, or leave --moe-backend out"
    without = [row.backend for row in fitting(target, version, sm, format_name, NO_WISH)]
    if without:
        asked = [
            name
            for name, value in (
                ("--ep", wish.ep > 1),
                ("--attention-dp", wish.attention_dp),
                ("--eplb-slots", wish.eplb),
            )
            if value
        ]
        return f"without {' and '.join(asked)} there is {' or '.join(without)}"
    return "`toolchain support` lists what works"


def _why(target: Target, version: str, row: Row, format_name: str, sm: int) -> str:
    others = [
        other for other in fitting(target, version, sm, format_name, NO_WISH) if other.backend != row.backend
    ]
    names = [other.backend for other in others if other.state == row.state]
    rivals = f"; {' and '.join(names)} {'does' if len(names) == 1 else 'do'} too: benchmark" if names else ""
    note = f"; {row.note}" if row.note else ""
    return f"{row.backend} runs {format_name} experts on SM{sm}{rivals}{note}"
