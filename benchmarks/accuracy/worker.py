"""One measurement: (model, method, seed) -> one JSON. Each runs in a process of its own, because ModelOpt's class
registration is global to a process; llm-compressor runs in its own environment below that."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.accuracy.methods import BY_NAME, Method
from benchmarks.accuracy.places import MODELS, PEER_PYTHON, ROOT, SCRATCH, run_file
from toolchain.core.files import atomic_write_json


def measure_in_process(model: str, method: str, seed: int) -> str | None:
    """Run ``measure`` in a fresh interpreter; None, or the end of what it printed when it failed."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.accuracy", "one", model, method, str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    return None if done.returncode == 0 else (done.stdout[-1000:] + done.stderr)[-3000:]


def measure(model: str, name: str, seed: int) -> None:
    """Write the result of one run; nothing is left of it elsewhere."""
    method = BY_NAME[name]
    scratch = SCRATCH / f"{model}--{name}--{seed}-{os.getpid()}"
    scratch.mkdir(parents=True)
    try:
        result = _run(model, method, seed, scratch)
    finally:
        shutil.rmtree(scratch)
    record = {
        "model": model,
        "method": name,
        "cell": method.cell,
        "kind": method.kind,
        "seed": seed,
        **result,
    }
    path = run_file(model, name, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_json(path, record)


def _run(model: str, method: Method, seed: int, scratch: Path) -> dict[str, Any]:
    from toolchain.core.environment import package_versions

    if method.kind == "llmcompressor":
        return _llmcompressor(model, method, seed, scratch)
    if method.kind == "source":
        result = _source(model, method)
    else:
        from benchmarks.accuracy import modelopt_plain, ours

        runner = {"modelopt": modelopt_plain, "ours": ours}[method.kind]
        result = runner.run(model, method, seed, scratch)
    return {**result, "versions": package_versions()}


def _source(model: str, method: Method) -> dict[str, Any]:
    """The unquantized model computed in another dtype: the floor below which a KL says nothing."""
    from benchmarks.accuracy.data import load_plain
    from benchmarks.accuracy.judge import judge

    loaded = load_plain(model, method.settings["dtype"])
    figures = judge(model, lambda ids: loaded(input_ids=ids, use_cache=False).logits)
    return {"judged": f"source in {method.settings['dtype']}", **figures}


def _llmcompressor(model: str, method: Method, seed: int, scratch: Path) -> dict[str, Any]:
    from benchmarks.accuracy.data import calibration_file, calibration_tokens, evaluation_file, tokens_hash
    from benchmarks.accuracy.judge import judge_file
    from benchmarks.accuracy.stored import describe_stored

    if not PEER_PYTHON.is_file():
        raise SystemExit(f"{PEER_PYTHON} does not exist; `python -m benchmarks.accuracy peers` makes it")
    paths = {name: str(scratch / name) for name in ("checkpoint", "logits", "result")}
    request = {
        **paths,
        "model": str(MODELS / model),
        "policy": method.policy,
        "settings": method.settings,
        "calibrated": method.calibrated,
        "calibration": str(calibration_file(model, seed)),
        "evaluation": str(evaluation_file(model)),
    }
    (scratch / "request.json").write_text(json.dumps(request), encoding="utf-8")
    script = Path(__file__).with_name("llmcompressor_plain.py")
    command = [str(PEER_PYTHON), "-W", "ignore", str(script), str(scratch / "request.json")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=scratch)
    if done.returncode:
        raise SystemExit(f"llm-compressor failed:\n{done.stdout[-1000:]}{done.stderr[-3000:]}")
    result = json.loads((scratch / "result").read_text(encoding="utf-8"))
    if method.settings:
        result["calibration_sha256"] = tokens_hash(calibration_tokens(model, seed))
        result["stored"] = describe_stored(scratch / "checkpoint", MODELS / model)
    judged = "exported bytes, by compressed-tensors" if method.settings else "source, by its transformers"
    return {**result, "judged": judged, **judge_file(model, scratch / "logits")}
