"""Load, tune and try this engine with the TensorRT-LLM that is installed: python3 warmup.py

Needs nothing but Python and tensorrt_llm. Stands in the engine's directory, beside checkpoint/, llm_args.yaml and
versions.lock.json; leaves warmup.log (all that TensorRT-LLM says) and, when a text came out, warmup.json.
Exit status: 0 done, 1 failed, 3 another release of TensorRT-LLM than the one that the engine was planned for.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import time

PROMPTS = ("The capital of France is", "def fibonacci(n):")
NEW_TOKENS = 16
CHOSEN = re.compile(r"MoEResolutionReport|moe.{0,40}backend|attn.{0,20}backend|autotun|cuda graph|kv cache", re.IGNORECASE)
MOST_LINES = 60
HERE = os.path.dirname(os.path.abspath(__file__))


def read(name):
    with open(os.path.join(HERE, name), encoding="utf-8") as handle:
        return handle.read()


def write(name, value):
    """Whole or not at all."""
    path = os.path.join(HERE, name)
    with open(path + ".partial", "w", encoding="utf-8") as handle:
        json.dump(value, handle, indent=2)
        handle.write("\n")
    os.replace(path + ".partial", path)


def say(text):
    os.write(TERMINAL, (text + "\n").encode())


def versions():
    found = {"python": platform.python_version()}
    for name in ("tensorrt-llm", "torch", "transformers", "nvidia-modelopt", "flashinfer-python"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def gpus():
    """Name, driver and memory of each GPU in MiB; empty without nvidia-smi."""
    names = ("name", "driver_version", "memory.used", "memory.total")
    command = ["nvidia-smi", "--query-gpu=" + ",".join(names), "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines()]
    return [
        {"name": row[0], "driver": row[1], "used_mib": int(row[2]), "total_mib": int(row[3])}
        for row in rows
        if len(row) == len(names) and row[2].isdigit() and row[3].isdigit()
    ]


def typed(arguments):
    """Nested mappings as the typed arguments that releases up to 1.2 want; later ones convert by themselves."""
    try:
        from tensorrt_llm.llmapi.llm_utils import update_llm_args_with_extra_dict
    except ImportError:
        return arguments
    return update_llm_args_with_extra_dict({}, arguments)


def chosen_lines():
    """What the log says of kernels, backends, graphs and caches, each line once."""
    sys.stdout.flush()
    sys.stderr.flush()
    with open(os.path.join(HERE, "warmup.log"), encoding="utf-8", errors="replace") as handle:
        found = dict.fromkeys(line.strip() for line in handle if CHOSEN.search(line))
    return list(found)[:MOST_LINES]


def run():
    import yaml

    lock = json.loads(read("versions.lock.json"))
    text = read("llm_args.yaml")
    started = time.monotonic()
    import tensorrt_llm

    installed = str(tensorrt_llm.__version__)
    if installed != lock["tensorrt_llm"]:
        say(f"TensorRT-LLM {installed} is installed, the engine was planned for {lock['tensorrt_llm']} ({lock['image']})")
        return 3
    from tensorrt_llm import LLM, SamplingParams

    imported, before = time.monotonic(), gpus()
    say(f"TensorRT-LLM {installed}: loading, tuning and capturing")
    llm = LLM(model=os.path.join(HERE, "checkpoint"), **typed(yaml.safe_load(text)))
    loaded = time.monotonic()
    say(f"loaded in {loaded - imported:.1f} s: generating")
    answers = llm.generate(list(PROMPTS), SamplingParams(max_tokens=NEW_TOKENS))
    ended = time.monotonic()
    texts = [answer.outputs[0].text for answer in answers]
    tokens = [len(answer.outputs[0].token_ids) for answer in answers]
    after = gpus()
    if len(texts) != len(PROMPTS) or not all(tokens):
        say(f"no tokens came out for {sum(not count for count in tokens)} of {len(PROMPTS)} prompts: {texts}")
        return 1
    result = {
        "schema_version": 1,
        "tensorrt_llm": installed,
        "versions": versions(),
        "llm_args_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "config_sha256": hashlib.sha256(read("checkpoint/config.json").encode()).hexdigest(),
        "seconds": {
            "import": round(imported - started, 2),
            "load_and_tune": round(loaded - imported, 2),
            "generate": round(ended - loaded, 2),
        },
        "generated": [
            {"prompt": prompt, "text": answer, "tokens": count}
            for prompt, answer, count in zip(PROMPTS, texts, tokens)
        ],
        "gpus": after,
        "used_mib_before": [gpu["used_mib"] for gpu in before],
        "chosen": chosen_lines(),
    }
    shutdown = getattr(llm, "shutdown", None)
    if shutdown is not None:
        shutdown()
    write("warmup.json", result)
    say(f"done in {ended - started:.1f} s: warmup.json, warmup.log")
    return 0


if __name__ == "__main__":  # MPI workers import this file again
    TERMINAL = os.dup(2)
    log = os.open(os.path.join(HERE, "warmup.log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if os.path.exists(os.path.join(HERE, "warmup.json")):
        os.unlink(os.path.join(HERE, "warmup.json"))
    try:
        status = run()
    except BaseException as error:
        import traceback

        traceback.print_exc()
        say(f"{type(error).__name__}: {error}")
        status = 1
    sys.exit(status)
