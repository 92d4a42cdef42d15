"""Which parameters of a student are trained, by the roles of their names."""

from __future__ import annotations

from torch import nn

from toolchain.checkpoint.source import open_source
from toolchain.core.errors import UsageError
from toolchain.core.progress import Progress
from toolchain.core.roles import Role
from toolchain.qat.layout import require_stored, stored_dtypes
from toolchain.qat.student import Student


def trained_roles(student: Student) -> frozenset[Role]:
    """The roles that the plan asks to train; those of the quantized matrices when it asks for none."""
    asked = student.plan.training.roles if student.plan.training else ()
    if asked:
        return frozenset(Role(name) for name in asked)
    return frozenset(_role(student, path) for path in student.modules)


def trained_names(student: Student) -> set[str]:
    """All names of the parameters of ``trained_roles``, biases and shared ones included."""
    roles = trained_roles(student)
    return {name for name in _named(student) if _role(student, name.rpartition(".")[0]) in roles}


def trainable_parameters(student: Student, progress: Progress | None = None) -> dict[str, nn.Parameter]:
    """Parameter name -> parameter, of those that are trained; all others are frozen. A shared one has its first name.

    A bias is trained with its matrix. Where the head is the embedding, either role trains the one tensor.
    UsageError TC-251 when the model has no parameter of a role that was asked for.
    """
    named, chosen = _named(student), trained_names(student)
    missing = trained_roles(student) - {_role(student, name.rpartition(".")[0]) for name in chosen}
    if missing:
        known = sorted({_role(student, name.rpartition(".")[0]) for name in named})
        raise UsageError(
            f"nothing of the model is {', '.join(sorted(missing))}, so it cannot be trained",
            hint=f"its parameters are: {', '.join(known)}",
            code="TC-251",
        )
    require_stored(student.model, chosen, stored_dtypes(open_source(student.source), student.family))
    ids = {id(named[name]) for name in chosen}
    along = sorted(name for name, item in named.items() if id(item) in ids and name not in chosen)
    if along and progress:
        progress.note(f"trained along, being the same tensor as one that is trained: {', '.join(along)}")
    for item in named.values():
        item.requires_grad_(id(item) in ids)
    return {name: item for name, item in student.model.named_parameters() if id(item) in ids}


def _named(student: Student) -> dict[str, nn.Parameter]:
    """The model's own parameters: learned scales of its quantizers have no role."""
    every = student.model.named_parameters(remove_duplicate=False)
    return {name: item for name, item in every if "_quantizer." not in name}


def _role(student: Student, path: str) -> Role:
    return student.family.classify(student.family.to_checkpoint(path)).role
