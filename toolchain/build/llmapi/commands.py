"""The commands of an engine of target ``trtllm``: serve, measure, evaluate, warm up; each with its container command.

They are run in the engine's directory, so that they stay true wherever that is. Options by release, with sources:
``data/commands.yaml``; a command that uses another one is a defect.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from toolchain.plan.types import Plan
from toolchain.targets.version import parse_version

DATA = Path(__file__).parent / "data"
ARGUMENTS, CHECKPOINT, DATASET = "llm_args.yaml", "checkpoint", "bench/trtllm/dataset.jsonl"
PREPARE = "/app/tensorrt_llm/benchmarks/cpp/prepare_dataset.py"
"""Where the release image has TensorRT-LLM's benchmarks."""
RAW = "bench/trtllm"
"""What trtllm-bench reads and writes; results of this toolchain's own shape are one directory above."""
PORT = 8000
REQUESTS_PER_USER = 4
MEASURED_TOKENS = 1024
"""Prompt and answer of NVIDIA's published figures (docs/source/developer-guide/perf-overview.md); less where
max_seq_len is."""
EVAL_TASKS = ("gsm8k", "mmlu")
PREPARED = "prepare_dataset.py is where the release image of 1.2 has it; later ones have trtllm-bench prepare-dataset"


@dataclass(frozen=True, kw_only=True)
class Command:
    name: str
    what: str
    words: tuple[str, ...]
    output: str = ""
    """File that takes what the command prints; empty: none."""
    ports: bool = False
    note: str = ""

    @property
    def text(self) -> str:
        """As it is typed in the engine's directory."""
        typed = shlex.join(self.words) + (f" > {shlex.quote(self.output)}" if self.output else "")
        return f"mkdir -p {RAW} && {typed}" if RAW in typed else typed

    def container(self, image: str) -> str:
        """The same in a container of ``image``: with all GPUs, and the limits that TensorRT-LLM's images ask for."""
        words = ["docker", "run", "--rm", "--gpus", "all", "--ipc", "host"]
        words += ["--ulimit", "memlock=-1", "--ulimit", "stack=67108864"]
        words += ["-p", f"{PORT}:{PORT}"] if self.ports else []
        # $PWD is the caller's: everything else is quoted.
        return (
            f'{shlex.join(words)} -v "$PWD":/engine -w /engine {shlex.join([image, "bash", "-c", self.text])}'
        )


def commands(plan: Plan, *, name: str) -> list[Command]:
    """What can be done with the engine called ``name``, whose bundle ``plan`` describes."""
    found = [
        Command(
            name="serve",
            what=f"an OpenAI-compatible server on port {PORT}",
            words=("trtllm-serve", CHECKPOINT, *_pairs({"--host": "0.0.0.0", "--port": PORT}), *_arguments()),
            ports=True,
        ),
        *_measuring(plan, name),
        *(_evaluating(plan, task) for task in EVAL_TASKS),
        Command(
            name="warmup",
            what="load, tune and try the engine: warmup.json, warmup.log",
            words=("python3", "warmup.py"),
            note="where toolchain and TensorRT-LLM are both installed, `toolchain build --warmup` does it",
        ),
    ]
    for command in found:
        unknown = unrecorded_options(command.words, plan.target_version)
        if unknown:
            raise ValueError(
                f"{command.name} uses {', '.join(unknown)}, recorded for no release up to this one"
            )
    return found


def _arguments() -> tuple[str, str]:
    """Named so in every release; newer ones take --config as well."""
    return ("--extra_llm_api_options", ARGUMENTS)


def _measuring(plan: Plan, name: str) -> list[Command]:
    """A data set of one length, and the throughput and latency that trtllm-bench measures with it."""
    serving = plan.serving
    tokens = max(1, min(MEASURED_TOKENS, serving.max_seq_len // 2))
    users = serving.max_batch_size * (serving.tp if serving.attention_dp else 1)
    lengths = {"--num-requests": users * REQUESTS_PER_USER, "--input-mean": tokens, "--input-stdev": 0,
               "--output-mean": tokens, "--output-stdev": 0}  # fmt: skip
    model = _pairs({"--model": name, "--model_path": CHECKPOINT})
    parallel = {"--tp": serving.tp, "--pp": serving.pp, **({"--ep": serving.ep} if serving.ep > 1 else {})}
    common = {"--backend": "pytorch", "--dataset": DATASET, **parallel}
    return [
        Command(
            name="bench-dataset",
            what=f"requests of {tokens} tokens with answers of {tokens} for trtllm-bench",
            words=(
                *("python3", PREPARE, "--stdout", "--tokenizer", CHECKPOINT, "token-norm-dist"),
                *_pairs(lengths),
            ),
            output=DATASET,
            note=PREPARED,
        ),
        Command(
            name="bench-throughput",
            what=f"throughput of {users} users at once",
            words=(
                *("trtllm-bench", *model, "throughput"),
                *_pairs({**common, "--concurrency": users, "--report_json": "bench/trtllm/throughput.json"}),
                *("--streaming", *_arguments()),
            ),
            note="`toolchain bench ENGINE --import bench/trtllm/throughput.json` takes the result into this engine",
        ),
        Command(
            name="bench-latency",
            what="latency of one user",
            words=(
                *("trtllm-bench", *model, "latency"),
                *_pairs({**common, "--concurrency": 1, "--num_requests": 16}),
                *("--report_json", "bench/trtllm/latency.json", *_arguments()),
            ),
        ),
    ]


def _evaluating(plan: Plan, task: str) -> Command:
    serving = plan.serving
    sizes = {"--tp_size": serving.tp, "--pp_size": serving.pp}
    sizes |= {"--ep_size": serving.ep} if serving.ep > 1 else {}
    return Command(
        name=f"eval-{task}",
        what=f"{task}, with TensorRT-LLM's own prompts: compare with itself on the source model only",
        words=("trtllm-eval", "--model", CHECKPOINT, *_pairs(sizes), *_arguments(), task),
    )


def _pairs(options: dict[str, Any]) -> tuple[str, ...]:
    return tuple(str(word) for pair in options.items() for word in pair)


@lru_cache(maxsize=1)
def recorded_options() -> dict[str, list[dict[str, Any]]]:
    """Program -> its records, oldest first."""
    import yaml

    found: dict[str, list[dict[str, Any]]] = yaml.safe_load(
        (DATA / "commands.yaml").read_text(encoding="utf-8")
    )
    return found


def unrecorded_options(words: tuple[str, ...], version: str) -> list[str]:
    """Options of a command that are not recorded for TensorRT-LLM ``version`` or the nearest older record."""
    program = next((Path(word).name for word in words if Path(word).name in recorded_options()), None)
    if program is None:
        return []
    records = recorded_options()[program]
    wanted = parse_version(version)
    record = next((item for item in reversed(records) if parse_version(item["since"]) <= wanted), records[0])
    known = set(record["options"])
    for word in words:
        known |= set(record[word]) if isinstance(record.get(word), list) and word != "options" else set()
    return [word for word in words if word.startswith("--") and word not in known]


def document(found: list[Command], image: str, version: str) -> dict[str, Any]:
    """commands.json."""
    return {
        "schema_version": 1,
        "tensorrt_llm": version,
        "image": image,
        "run_in": "the directory of this file",
        "commands": [
            {
                "name": item.name,
                "what": item.what,
                "command": item.text,
                "argv": list(item.words),
                "container": item.container(image),
                "note": item.note,
            }
            for item in found
        ],
    }


def markdown(found: list[Command], image: str, version: str) -> str:
    """commands.md: the same for people."""
    lines = [
        f"# Commands for TensorRT-LLM {version}",
        "",
        f"Run them in this directory, where TensorRT-LLM {version} is installed, or in a container of `{image}`.",
    ]
    for item in found:
        lines += ["", f"## {item.name}", "", f"{item.what[0].upper()}{item.what[1:]}.", ""]
        lines += ["```", item.text, "```", "", "```", item.container(image), "```"]
        lines += ["", f"Note: {item.note}."] if item.note else []
    return "\n".join(lines) + "\n"
