"""Which parameters of a student are trained, by the roles of their names."""

from __future__ import annotations

from torch import nn

from toolchain.core.errors import UsageError
from toolchain.core.progress import Progress, Silent
from toolchain.core.roles import Role
from toolchain.qat.student import Student


def trained_roles(student: Student) -> frozenset[Role]:
    """The roles that the plan asks to train; those of the quantized matrices when it asks for none."""
    asked = student.plan.training.roles if student.plan.training else ()
    if asked:
        return frozenset(Role(name) for name in asked)
    return frozenset(_role(student, path) for path in student.modules)


def trainable_parameters(student: Student, progress: Progress | None = None) -> dict[str, nn.Parameter]:
    """Parameter name -> parameter, of those that are trained; all others are frozen. A shared one has its first name.

    A bias is trained with its matrix. Where the head is the embedding, either role trains the one tensor.
    ToolchainError TC-251 when the model has no parameter of a role that was asked for.
    """
    progress = progress or Silent()
    roles = trained_roles(student)
    named = dict(student.model.named_parameters(remove_duplicate=False))
    chosen = {name: item for name, item in named.items() if _role(student, name.rpartition(".")[0]) in roles}
    found = {_role(student, name.rpartition(".")[0]) for name in chosen}
    if roles - found:
        missing, known = (
            sorted(roles - found),
            sorted({_role(student, name.rpartition(".")[0]) for name in named}),
        )
        raise UsageError(
            f"nothing of the model is a {', '.join(missing)}, so it cannot be trained",
            hint=f"its parameters are: {', '.join(known)}",
            code="TC-251",
        )
    ids = {id(item) for item in chosen.values()}
    _tell_shared(named, chosen, progress)
    trained = {name: item for name, item in student.model.named_parameters() if id(item) in ids}
    for item in named.values():
        item.requires_grad_(id(item) in ids)
    return trained


def _role(student: Student, path: str) -> Role:
    return student.family.classify(student.family.to_checkpoint(path)).role


def _tell_shared(named: dict[str, nn.Parameter], chosen: dict[str, nn.Parameter], progress: Progress) -> None:
    ids = {id(item) for item in chosen.values()}
    shared = sorted(name for name, item in named.items() if id(item) in ids and name not in chosen)
    if shared:
        progress.note(f"trained along, being the same tensor as one that is trained: {', '.join(shared)}")
