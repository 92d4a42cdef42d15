"""A stand-in for ``trtllm-build`` on PATH: it takes the recorded flags and no others, reads the rank files, and writes
engines of a few bytes. The real one has not been run here.

``install(prefix, version)`` lays out an environment as pip does: ``bin/trtllm-build`` and the metadata of tensorrt_llm.
What it does besides is told by the environment variable FAKE_TRTLLM: ``fail``, ``hang``, ``no-engine``, or
``version=X``, the release that it writes into the engine.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

BEHAVIOUR = "FAKE_TRTLLM"
CHILD = "import time; time.sleep(600)"


def install(prefix: Path, version: str) -> Path:
    """Make the environment and return its ``bin``."""
    metadata = prefix / "lib" / "python3.12" / "site-packages" / f"tensorrt_llm-{version}.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: tensorrt_llm\nVersion: {version}\n")
    program = prefix / "bin" / "trtllm-build"
    program.parent.mkdir()
    root = Path(__file__).parent.parent
    program.write_text(
        f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(root)!r})\n"
        f"from tests.fake_trtllm_build import main\nsys.exit(main(sys.argv[1:], {version!r}))\n"
    )
    program.chmod(0o755)
    return program.parent


def main(words: list[str], version: str) -> int:
    """Exit status as the real one's: 2 for words that it does not take."""
    arguments = _parse(words)
    behaviour = os.environ.get(BEHAVIOUR, "")
    checkpoint, output = Path(arguments.checkpoint_dir), Path(arguments.output_dir)
    config = json.loads((checkpoint / "config.json").read_text())
    _say("I", f"Build for {arguments.max_batch_size} requests")
    if behaviour == "hang":
        child = subprocess.Popen([sys.executable, "-c", CHILD])
        _say("I", f"worker {child.pid}")
        time.sleep(600)
    if behaviour == "fail":
        _say("W", "memory is low")
        _say("E", "Engine building failed, please check the error log.")
        return 1
    output.mkdir(exist_ok=True)
    for rank in range(config["mapping"]["world_size"]):
        _header(checkpoint / f"rank{rank}.safetensors")
        _say("I", f"Build TensorRT engine Unnamed Network {rank}")
        _say("I", f"Total time of building Unnamed Network {rank}: 00:00:01")
        if behaviour == "no-engine":
            continue
        _say("I", f"Serializing engine to {output}/rank{rank}.engine...")
        (output / f"rank{rank}.engine").write_bytes(b"engine")
        _say("I", "Engine serialized. Total time: 00:00:00")
    written = behaviour.removeprefix("version=") if behaviour.startswith("version=") else version
    made = {"version": written, "pretrained_config": config, "build_config": vars(arguments)}
    (output / "config.json").write_text(json.dumps(made))
    _say("I", "Total time of building all engines: 00:00:02")
    return 0


def _parse(words: list[str]) -> argparse.Namespace:
    """argparse over the recorded flags: an unknown one, or a value that is not among the choices, ends with 2."""
    from toolchain.build.tensorrt.flags import FLAGS

    parser = argparse.ArgumentParser(allow_abbrev=False)
    for flag in FLAGS.values():
        if flag.kind == "switch":
            parser.add_argument(f"--{flag.name}", action="store_true")
        elif flag.kind == "int":
            parser.add_argument(f"--{flag.name}", type=int)
        else:
            parser.add_argument(f"--{flag.name}", choices=flag.choices or None)
    return parser.parse_args(words)


def _header(path: Path) -> None:
    """Fails, as the real one does, when a rank's file is missing or damaged."""
    with path.open("rb") as handle:
        json.loads(handle.read(int.from_bytes(handle.read(8), "little")))


def _say(level: str, text: str) -> None:
    print(f"[11/21/2026-12:00:00] [TRT-LLM] [{level}] {text}", flush=True)
