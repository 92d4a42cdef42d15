"""Tasks of lm-evaluation-harness on the local runtime, against the harness's own Hugging Face model.

The harness is not part of the environment: `make lm-eval` (a part of `make test`) puts it beside it.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from toolchain.core.errors import ToolchainError, UsageError
from toolchain.evaluate.harness import library
from toolchain.evaluate.harness.commands import trtllm_commands
from toolchain.evaluate.harness.library import require_lm_eval
from toolchain.evaluate.harness.tasks import run_tasks
from toolchain.runtime.engine import LocalEngine

Tiny = Callable[[str], Path]
Run = Callable[..., Any]

CHOICES = """\
task: tiny_choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}} ="
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
metadata: {{version: 3}}
"""
ANSWERS = """\
task: tiny_answers
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}} ="
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n", "e"], max_gen_toks: 12, do_sample: false}}
metric_list: [{{metric: exact_match}}]
metadata: {{version: 1}}
"""
TEXTS = """\
task: tiny_texts
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: byte_perplexity}}]
metadata: {{version: 1}}
"""


@pytest.fixture(scope="module")
def harness() -> None:
    try:
        require_lm_eval()
    except ToolchainError:
        pytest.skip("lm-evaluation-harness is not installed: make lm-eval")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with three tasks over eight documents."""
    root = tmp_path_factory.mktemp("tasks")
    documents = [
        {
            "question": f"{left} + {left + 3}",
            "choices": [str(2 * left + 3), f"{left} apples", "x", str(left)],
            "answer": 0,
            "text": f"the sum of {left} and {left + 3} is {2 * left + 3}. " * (1 + left),
        }
        for left in range(8)
    ]
    data = root / "documents.jsonl"
    data.write_text("".join(json.dumps(item) + "\n" for item in documents))
    for name, text in {"choices": CHOICES, "answers": ANSWERS, "texts": TEXTS}.items():
        (root / f"{name}.yaml").write_text(text.format(data=data))
    return root


@pytest.fixture(autouse=True)
def caches(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def pair(harness: None, tiny: Tiny) -> Iterator[tuple[Any, Any]]:
    """(ours, the harness's own) over one model in float32, with room for 96 tokens."""
    import torch
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from toolchain.evaluate.harness.adapter import LocalLM

    directory = tiny("qwen3_moe")
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, experts_implementation="eager"
    )
    theirs = HFLM(
        pretrained=model.eval(),
        tokenizer=AutoTokenizer.from_pretrained(directory),
        batch_size=3,
        max_length=96,
        device="cpu",
    )
    with LocalEngine.load(directory, device="cpu", dtype=torch.float32, max_seq_len=96) as engine:
        yield LocalLM(engine, batch_size=3), theirs


def requests(kind: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [
        Instance(request_type=kind, doc={}, arguments=item, idx=index) for index, item in enumerate(arguments)
    ]


def test_log_likelihoods_are_those_of_the_harness(pair: tuple[Any, Any]) -> None:
    ours, theirs = pair
    greedy = theirs.generate_until(requests("generate_until", [("2 + 2 =", {"max_gen_toks": 2})]))[0]
    asked = [
        ("2 + 2 =", " 4"),
        ("2 + 2 =", " 5"),  # one row with the one above but for the last token
        ("2 + 2 =", greedy),
        ("a b ", "c"),  # the space belongs to the answer
        ("", "no context"),
        ("x" * 120, "longer than the model takes"),
        ("<s>begun", " already"),
    ]
    expected = theirs.loglikelihood(requests("loglikelihood", asked))
    measured = ours.loglikelihood(requests("loglikelihood", asked))
    assert [item[0] for item in measured] == pytest.approx([item[0] for item in expected], rel=1e-5)
    assert [item[1] for item in measured] == [item[1] for item in expected]
    assert measured[2][1], "what greedy decoding gave is greedy"
    assert ours.truncated == 1


def test_whole_texts_are_those_of_the_harness(pair: tuple[Any, Any]) -> None:
    ours, theirs = pair
    asked = [("short",), ("long enough for three windows of the model. " * 5,), ("middle " * 9,)]
    expected = theirs.loglikelihood_rolling(requests("loglikelihood_rolling", asked))
    measured = ours.loglikelihood_rolling(requests("loglikelihood_rolling", asked))
    assert measured == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"max_gen_toks": 20},
        {"until": ["e", "\n"], "max_gen_toks": 24},
        {"until": "<|im_end|>", "max_new_tokens": 30},
        {"until": ["o", "ro"], "max_gen_toks": 30, "do_sample": False, "temperature": 0.7},
    ],
)
def test_answers_are_those_of_the_harness(pair: tuple[Any, Any], settings: dict[str, Any]) -> None:
    ours, theirs = pair
    prompts = ["2 + 2 =", "def main():", "z" * 130, "once upon a time there was", "a", "b", "c", "d e f"]
    asked = [(prompt, dict(settings)) for prompt in prompts]
    expected = theirs.generate_until(requests("generate_until", asked))
    assert ours.generate_until(requests("generate_until", asked)) == expected


def test_a_special_token_that_ends_an_answer(tiny: Tiny, harness: None, tmp_path: Path) -> None:
    """It is no text, so no stop string. The model is made to say <|im_end|> (3) where it said its fourth token."""
    import shutil

    from lm_eval.models.huggingface import HFLM
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from toolchain.evaluate.harness.adapter import LocalLM
    from toolchain.runtime.types import SamplingParams

    directory = shutil.copytree(tiny("llama"), tmp_path / "model")
    with LocalEngine.load(directory, device="cpu") as engine:
        answer = engine.generate("2 + 2 =", SamplingParams(max_tokens=12, ignore_eos=True)).token_ids
    tensors = load_file(directory / "model.safetensors")
    tensors["lm_head.weight"][3] = 1.1 * tensors["lm_head.weight"][answer[3]]
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    asked = [("2 + 2 =", {"until": ["never", "<|im_end|>"], "max_gen_toks": 12})]
    with LocalEngine.load(directory, device="cpu") as engine:
        raw = engine.generate("2 + 2 =", SamplingParams(max_tokens=12)).token_ids
        measured = LocalLM(engine).generate_until(requests("generate_until", asked))
    assert 3 in raw[:-1], "without the stop it goes on"
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, device="cpu")
    assert measured == theirs.generate_until(requests("generate_until", asked))
    assert measured == [tokenizer.decode(raw[: raw.index(3)])]


def test_sampled_answers_repeat(pair: tuple[Any, Any]) -> None:
    ours, _ = pair
    asked = [("2 + 2 =", {"max_gen_toks": 12, "do_sample": True, "temperature": 1.0})] * 2
    first = ours.generate_until(requests("generate_until", asked))
    assert first == ours.generate_until(requests("generate_until", asked))
    assert first[0] != first[1], "each request draws for itself"


def test_tasks_give_the_figures_of_the_harness(tasks: Path, tiny: Tiny, harness: None) -> None:
    """The same tasks, run by the harness alone on the same BF16 model computed in float32."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    names = ["tiny_choices", "tiny_answers", "tiny_texts"]
    report = run_tasks(tiny("qwen3_moe"), names, include_path=tasks, device="cpu", num_fewshot=2)
    theirs = simple_evaluate(
        model="hf",
        model_args={"pretrained": str(tiny("qwen3_moe")), "dtype": "bfloat16", "softmax_dtype": "float32"},
        tasks=names,
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        device="cpu",
        batch_size=1,
        num_fewshot=2,
        bootstrap_iters=100,
    )
    assert theirs is not None
    assert json.loads(json.dumps(report)) == report
    for name in names:
        ours, expected = report["results"][name], theirs["results"][name]
        assert ours["samples"] == ours["documents"] == 8
        assert ours["num_fewshot"] == 2
        for metric, found in ours["metrics"].items():
            assert found["value"] == pytest.approx(expected[f"{metric},none"], rel=0.02), (name, metric)
    choices = report["results"]["tiny_choices"]
    assert choices["metrics"]["acc"]["stderr"] == pytest.approx(
        theirs["results"]["tiny_choices"]["acc_stderr,none"]
    )
    assert choices["metrics"]["acc"]["higher_is_better"] is True
    assert choices["version"] == 3
    again = run_tasks(tiny("qwen3_moe"), ["tiny_choices"], include_path=tasks, device="cpu", num_fewshot=2)
    assert again["results"] == {"tiny_choices": choices}
    other = run_tasks(tiny("qwen3_moe"), ["tiny_choices"], include_path=tasks, device="cpu", limit=4)
    assert other["results"]["tiny_choices"]["samples"] == 4
    assert other["results"]["tiny_choices"]["prompts_hash"] != choices["prompts_hash"]


def test_a_quantized_checkpoint_and_its_weights_alone(tasks: Path, made: Any, harness: None) -> None:
    """The engine runs its tasks, and activations in four bits move the figures."""
    names = ["tiny_texts"]
    target = run_tasks(made.engine, names, include_path=tasks, device="cpu")
    weights = run_tasks(made.engine, names, include_path=tasks, device="cpu", emulate=False)
    figures = [
        item["results"]["tiny_texts"]["metrics"]["byte_perplexity"]["value"] for item in (target, weights)
    ]
    assert all(map(math.isfinite, figures))
    assert figures[0] != figures[1]
    assert [item["settings"]["emulation"] for item in (target, weights)] == ["target", "weights"]


def test_the_chat_template_is_applied(tasks: Path, tiny: Tiny, harness: None) -> None:
    plain, chat = (
        run_tasks(tiny("llama"), ["tiny_answers"], include_path=tasks, device="cpu", chat_template=flag)
        for flag in (False, True)
    )
    hashes = [item["results"]["tiny_answers"]["prompts_hash"] for item in (plain, chat)]
    assert hashes[0] != hashes[1]
    assert "--apply_chat_template" in chat["commands"][0]["command"]


def test_what_cannot_be_run_is_said(
    tasks: Path, tiny: Tiny, harness: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tiny("llama")
    with pytest.raises(UsageError, match="no task tiny_choicse") as caught:
        run_tasks(directory, ["tiny_choicse"], include_path=tasks)
    assert (caught.value.code, "tiny_choices" in caught.value.hint) == ("TC-541", True)
    with pytest.raises(UsageError, match="not a directory"):
        run_tasks(directory, ["tiny_choices"], include_path=tmp_path / "absent")
    gone = ANSWERS.format(data=tmp_path / "gone.jsonl").replace("tiny_answers", "tiny_gone")
    (tmp_path / "gone.yaml").write_text(gone)
    with pytest.raises(ToolchainError, match="tiny_gone cannot be run") as failed:
        run_tasks(directory, ["tiny_gone"], include_path=tmp_path, device="cpu")
    assert failed.value.code == "TC-542"
    long = ANSWERS.replace("max_gen_toks: 12", "max_gen_toks: 512").replace("tiny_answers", "tiny_long")
    (tmp_path / "gone.yaml").write_text(long.format(data=tasks / "documents.jsonl"))
    with pytest.raises(ToolchainError, match="512 tokens, the engine takes 512") as longest:
        run_tasks(directory, ["tiny_long"], include_path=tmp_path, device="cpu")
    assert longest.value.code == "TC-543"


def test_without_the_harness_the_error_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import sys

    monkeypatch.setattr(library, "BESIDE", tmp_path / "absent")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ToolchainError, match="no module 'lm_eval'") as caught:
        require_lm_eval()
    assert caught.value.code == "TC-540"
    assert "make lm-eval" in caught.value.hint


def test_commands_for_tensorrt_llm(tmp_path: Path) -> None:
    from tests.engine_dirs import write_engine

    engine = write_engine(tmp_path / "engine", target="trtllm")
    manifest = json.loads((engine / "engine.json").read_text())
    (engine / "engine.json").write_text(json.dumps(manifest | {"parallel": {"tp": 4, "ep": 2, "pp": 1}}))
    names = ["gsm8k", "arc_easy"]
    harness, own = trtllm_commands(engine, names, limit=50, num_fewshot=5, chat_template=True)
    words = shlex.split(harness["command"])
    assert words[:3] == ["lm_eval", "--model", "trtllm"]
    assert words[words.index("--tasks") + 1] == "gsm8k,arc_easy"
    settings = dict(item.split("=", 1) for item in words[words.index("--model_args") + 1].split(","))
    assert settings["model"] == str(engine / "checkpoint")
    assert settings["tensor_parallel_size"] == "4"
    assert int(settings["max_input_len"]) + int(settings["max_output_len"]) == 512
    words = shlex.split(own["command"])
    assert (words[0], words[words.index("--ep_size") + 1], own["tasks"]) == ("trtllm-eval", "2", ["gsm8k"])
    assert words[words.index("--extra_llm_api_options") + 1] == str(engine / "llm_args.yaml")
    assert words[-3:] == ["gsm8k", "--num_samples", "50"]


def test_the_harness_accepts_the_options_of_the_command(tmp_path: Path, harness: None) -> None:
    """Its own parser reads what we print, and its model for TensorRT-LLM knows the arguments."""
    import inspect

    from lm_eval._cli.harness import HarnessCLI
    from lm_eval.models.trtllm_causallms import TRTLLM

    from tests.engine_dirs import write_engine

    engine = write_engine(tmp_path / "engine", target="trtllm")
    (command, *_) = trtllm_commands(
        engine, ["arc_easy"], include_path=tmp_path, limit=5, num_fewshot=2, chat_template=True
    )
    words = shlex.split(command["command"])[1:]
    parsed = HarnessCLI()._parser.parse_args(["run", *words])
    assert parsed.model == "trtllm"
    assert parsed.limit == 5
    assert set(parsed.model_args) <= set(inspect.signature(TRTLLM.__init__).parameters)


def test_evaluate_runs_tasks_and_keeps_them_in_the_engine(
    toolchain: Run, tasks: Path, made: Any, harness: None, tmp_path: Path
) -> None:
    engine = made.copy_to(tmp_path).engine
    options = ("--tasks-path", tasks, "--device", "cpu", "--json")
    first = toolchain("evaluate", engine, "--tasks", "tiny_choices", *options)
    assert first.status == 0, first.err
    report = first.json["tasks"]
    assert "ppl" not in first.json, "no text was given"
    assert report["results"]["tiny_choices"]["samples"] == 8
    toolchain("evaluate", engine, "--tasks", "tiny_answers", *options)
    kept = json.loads((engine / "tasks.json").read_text())
    assert set(kept["results"]) == {"tiny_choices", "tiny_answers"}
    other = toolchain("evaluate", engine, "--tasks", "tiny_answers", "--emulation", "weights", *options)
    assert other.json["tasks"]["settings"]["emulation"] == "weights"
    kept = json.loads((engine / "tasks.json").read_text())
    assert set(kept["results"]) == {"tiny_answers"}, "figures of other settings do not stand side by side"


def test_evaluate_prints_commands_without_running(toolchain: Run, made: Any) -> None:
    ran = toolchain("evaluate", made.engine, "--tasks", "gsm8k", "--tasks-commands")
    assert ran.status == 0, ran.err
    assert "trtllm-eval --model" in ran.out
    assert "lm_eval --model trtllm" in ran.out


@pytest.mark.parametrize("option", [("--limit", 3), ("--num-fewshot", 1), ("--tasks-chat",)])
def test_options_of_tasks_need_tasks(toolchain: Run, made: Any, option: tuple[object, ...]) -> None:
    ran = toolchain("evaluate", made.engine, *option)
    assert ran.status == 2
    assert "--tasks" in ran.err
