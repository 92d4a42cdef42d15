"""Is a repository on disk the one of these engines? A stale one would serve, or measure, another engine in silence."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from toolchain.core.errors import UsageError
from toolchain.triton.contract import MODEL_NAME
from toolchain.triton.engine_dir import EngineDir
from toolchain.triton.inflight_contract import MODELS as INFLIGHT_MODELS
from toolchain.triton.model_dir import read_config
from toolchain.triton.served import SERVED, read_served, version_dirs


def refuse_stale_repository(engines: EngineDir | Mapping[str, EngineDir], repository: Path) -> None:
    """UsageError TC-612 when ``repository`` does not hold exactly these models, or when the newest version of one was
    rendered for another target or for an engine elsewhere.

    ``engines``: by the names of their models, or one, whose model has the usual name.
    """
    if isinstance(engines, EngineDir):
        engines = {MODEL_NAME: engines}
    held = {path.name for path in repository.iterdir() if path.is_dir() and path.name[0] != "."}
    wanted = set(engines)
    if any(engine.target == "tensorrt" for engine in engines.values()):
        wanted = set(INFLIGHT_MODELS)
    paths = " ".join(str(engine.path) for engine in engines.values())
    again = f"render it again: toolchain triton {paths} --output {repository} --force"
    if held != wanted and held != set(INFLIGHT_MODELS):  # those are told by their target below
        raise UsageError(
            f"{repository} holds {', '.join(sorted(held)) or 'no model'}; expected {', '.join(sorted(wanted))}",
            hint=again,
            code="TC-612",
        )
    for name, engine in engines.items():
        target, path = rendered_for(repository / name)
        expected = engine.checkpoint if engine.target == "trtllm" else engine.path
        if path is None:
            raise UsageError(
                f"{repository / name} does not say which engine it serves: an earlier release rendered it, or another "
                "program",
                hint=again,
                code="TC-612",
            )
        if target != engine.target or path.resolve() != expected.resolve():
            raise UsageError(
                f"{repository}, {name}, was rendered for target {target}, {path}; engine {engine.name} is target "
                f"{engine.target}, {expected}",
                hint=again,
                code="TC-612",
            )


def rendered_for(model: Path) -> tuple[str, Path | None]:
    """(target, path of the engine or checkpoint) that the newest version of a rendered model names; its lint has passed
    already."""
    import yaml

    newest = version_dirs(model)[-1]
    settings = newest / "model.yaml"
    if settings.is_file():
        value = yaml.safe_load(settings.read_text(encoding="utf-8"))
        return "trtllm", Path(str(value["model"])) if isinstance(value, dict) and "model" in value else None
    if (newest / SERVED).is_file():
        named = str(read_served(newest).get("engine_dir", ""))
        return "local", Path(named) if named else None
    config = read_config(model)
    named = config.parameters["gpt_model_path"].string_value if "gpt_model_path" in config.parameters else ""
    return "tensorrt", Path(named).parent if named else None
