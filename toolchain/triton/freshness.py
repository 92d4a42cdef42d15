"""Is a repository on disk the one of this engine? A stale one would serve, or measure, another engine in silence."""

from __future__ import annotations

from pathlib import Path

from toolchain.core.errors import UsageError
from toolchain.triton.contract import MODEL_NAME
from toolchain.triton.engine_dir import EngineDir
from toolchain.triton.served import SERVED, read_served


def refuse_stale_repository(engine: EngineDir, repository: Path) -> None:
    """UsageError TC-612 when ``repository`` was rendered for another target or for an engine elsewhere."""
    target, path = _rendered_for(repository / MODEL_NAME)
    expected = engine.checkpoint if engine.target == "trtllm" else engine.path
    if target != engine.target or path is None or path.resolve() != expected.resolve():
        raise UsageError(
            f"{repository} was rendered for target {target}, {path}; engine {engine.name} is target "
            f"{engine.target}, {expected}",
            hint=f"render it again: toolchain triton {engine.path} --output {repository} --force",
            code="TC-612",
        )


def _rendered_for(model: Path) -> tuple[str, Path | None]:
    """(target, path of the engine or checkpoint) that a rendered model names; its lint has passed already."""
    import yaml
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    settings = model / "1" / "model.yaml"
    if settings.is_file():
        value = yaml.safe_load(settings.read_text(encoding="utf-8"))
        return "trtllm", Path(str(value["model"])) if isinstance(value, dict) and "model" in value else None
    if (model / "1" / SERVED).is_file():
        named = str(read_served(model / "1").get("engine_dir", ""))
        return "local", Path(named) if named else None
    config = model_config_pb2.ModelConfig()
    text_format.Parse((model / "config.pbtxt").read_text(encoding="utf-8"), config)
    named = config.parameters["gpt_model_path"].string_value if "gpt_model_path" in config.parameters else ""
    return "tensorrt", Path(named).parent if named else None
