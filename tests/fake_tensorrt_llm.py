"""Stands in for ``tensorrt_llm`` where a test is about what our own files do with it.

It implements the published contract of the LLM API and nothing else: ``LLM(model=..., **arguments)``,
``generate(prompts, sampling_params)`` with ``outputs[0].text`` and ``token_ids``, ``shutdown()``. It runs no model, and
says so in what it generates. ``install`` writes it as a package for PYTHONPATH; ``behaviour`` is
what a test wants of it.
"""

from __future__ import annotations

from pathlib import Path

MODULE = '''
"""A stand-in for TensorRT-LLM: it runs no model."""
import json, os, signal, sys, time

__version__ = "{version}"
BEHAVIOUR = "{behaviour}"


class SamplingParams:
    def __init__(self, max_tokens=32, **rest):
        assert not rest, rest
        self.max_tokens = max_tokens


class _Output:
    def __init__(self, text, token_ids):
        self.text, self.token_ids = text, token_ids


class _Answer:
    def __init__(self, prompt, text, token_ids):
        self.prompt, self.outputs = prompt, [_Output(text, token_ids)]


class LLM:
    def __init__(self, model, **arguments):
        print("[TRT-LLM] [I] MoEResolutionReport: layers 0-1 backend", arguments.get("moe_config"))
        print("[TRT-LLM] [I] [Autotuner] Autotuning process ends", file=sys.stderr)
        with open(os.path.join(model, "config.json")) as handle:
            json.load(handle)
        if BEHAVIOUR == "fails":
            raise RuntimeError("no kernel for this GPU")
        if BEHAVIOUR == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if BEHAVIOUR == "hangs":
            time.sleep(600)
        self.arguments = arguments

    def generate(self, prompts, sampling_params):
        count = 0 if BEHAVIOUR == "silent" else sampling_params.max_tokens
        return [_Answer(prompt, " stand-in" * count, list(range(count))) for prompt in prompts]

    def shutdown(self):
        print("[TRT-LLM] [I] shut down")
'''


def install(directory: Path, version: str, behaviour: str = "works") -> Path:
    """A directory for PYTHONPATH that has ``tensorrt_llm`` and its metadata, as pip leaves them."""
    package = directory / "tensorrt_llm"
    package.mkdir(parents=True)
    text = MODULE.replace("{version}", version).replace("{behaviour}", behaviour)
    (package / "__init__.py").write_text(text)
    metadata = directory / f"tensorrt_llm-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: tensorrt_llm\nVersion: {version}\n")
    return directory
