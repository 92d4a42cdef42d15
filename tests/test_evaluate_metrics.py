"""Every figure of the report against a direct computation in float64 from transformers' own forward."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.planning import plan_for
from tests.tiny import make_tiny
from toolchain.core.errors import ToolchainError
from toolchain.evaluate.checkpoint import evaluate_checkpoint
from toolchain.evaluate.compare import compare_models
from toolchain.modeling.loading import load_checkpoint
from toolchain.quantize.job import quantize

CPU = torch.device("cpu")
Tiny = Callable[[str], Path]
TEXT = "def f(x):\n    return x * 31 + 7  # some bytes, one token each\n" * 6
WINDOW = 32


def evaluate(directory: Path, baseline: Path | None, data: Path, **options: Any) -> dict[str, Any]:
    """A report on 256 tokens, which must be JSON without NaN."""
    settings = {"max_tokens": 256, "window": WINDOW, "device": "cpu", "generations": 0, **options}
    report = evaluate_checkpoint(directory, baseline=baseline, data=data, **settings)
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    return report


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


def in_float32(source: Path, directory: Path) -> Path:
    """The same values in a wider type: logits have no ties there."""
    changed(source, directory, lambda name, tensor: tensor.float())
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    return directory


def changed(source: Path, directory: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> Path:
    """A copy of ``source`` with every tensor put through ``change``."""
    shutil.copytree(source, directory)
    tensors = load_file(source / "model.safetensors")
    save_file(
        {name: change(name, tensor).contiguous() for name, tensor in tensors.items()},
        directory / "model.safetensors",
        {"format": "pt"},
    )
    return directory


def noisy(share: float, *parts: str) -> Callable[[str, torch.Tensor], torch.Tensor]:
    """Relative noise on tensors whose name holds one of ``parts``."""
    generator = torch.Generator().manual_seed(5)

    def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if not any(part in name for part in parts):
            return tensor
        return tensor * (1 + share * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)

    return change


def transformers_model(directory: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        directory, dtype="auto", experts_implementation="eager"
    ).eval()


@torch.no_grad()
def direct(directory: Path, rows: list[list[int]]) -> list[dict[str, Any]]:
    """Of each row of ids: log probabilities [T, V], outputs of each layer [T, H], router logits [T, E], float64."""
    model, found = transformers_model(directory), []
    outputs: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, __, out: outputs.append(out[0] if type(out) is tuple else out))
    for row in rows:
        outputs.clear()
        answer = model(torch.tensor([row]), output_router_logits=True)
        found.append(
            {
                "log_p": answer.logits[0].double().log_softmax(-1),
                "hidden": [hidden.reshape(len(row), -1).double() for hidden in outputs],
                "router": [logits.double() for logits in answer.router_logits],
            }
        )
    return found


def chosen_experts(logits: torch.Tensor) -> list[dict[int, float]]:
    """Of each token, expert -> routing weight: softmax, the two largest, normalized (Qwen3-MoE)."""
    top = logits.softmax(-1).topk(2, dim=-1)
    return [
        dict(zip(index.tolist(), (value / value.sum()).tolist(), strict=True))
        for value, index in zip(top.values, top.indices, strict=True)
    ]


@pytest.mark.parametrize("stride", [WINDOW, 20])
def test_every_figure_equals_a_direct_computation(
    tiny: Tiny, tmp_path: Path, text: Path, stride: int
) -> None:
    """Windows that overlap: each token is scored, and each position counted, in the first window that holds it."""
    source = in_float32(tiny("qwen3_moe"), tmp_path / "source")
    other = changed(source, tmp_path / "other", noisy(0.2, "self_attn", "experts"))
    report = evaluate(other, source, text, stride=stride)
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(source)(TEXT)["input_ids"]
    last = len(tokens) - WINDOW  # eight windows, spread evenly
    starts = [index * last // 7 for index in range(8)]
    tokens = [token for start in starts for token in tokens[start : start + WINDOW]]
    begins = [0, *range(stride, len(tokens) - WINDOW + stride, stride)]
    rows = [tokens[start : start + WINDOW] for start in begins]
    fresh = [0, *[WINDOW - stride] * (len(rows) - 1)]

    kl, reverse, top1, top5, nll, base_nll, hidden = [], [], [], [], [], [], [[], []]
    common, same, weighted = ([[], []] for _ in range(3))
    loads = np.zeros((2, 2, 4))
    for row, start, mine, base in zip(rows, fresh, direct(other, rows), direct(source, rows), strict=True):
        scored = slice(max(start, 1) - 1, len(row) - 1)
        q, p = mine["log_p"][scored], base["log_p"][scored]
        kl += (p.exp() * (p - q)).sum(-1).tolist()
        reverse += (q.exp() * (q - p)).sum(-1).tolist()
        for one, two, target in zip(q, p, row[max(start, 1) :], strict=True):
            first, second = one.topk(5).indices.tolist(), two.topk(5).indices.tolist()
            top1.append(first[0] == second[0])
            top5.append(len(set(first) & set(second)) / 5)
            nll.append(-float(one[target]))
            base_nll.append(-float(two[target]))
        for layer in (0, 1):
            one, two = mine["hidden"][layer][start:], base["hidden"][layer][start:]
            hidden[layer] += ((one - two).norm(dim=-1) / two.norm(dim=-1)).square().tolist()
            choices = [chosen_experts(item["router"][layer])[start:] for item in (mine, base)]
            for ours, theirs in zip(*choices, strict=True):
                both = ours.keys() & theirs.keys()
                common[layer].append(len(both) / 2)
                same[layer].append(len(both) == 2)
                weighted[layer].append(sum(theirs[expert] for expert in both))
                loads[0, layer, list(ours)] += 1
                loads[1, layer, list(theirs)] += 1
    close = {"rel": 1e-4}
    assert report["tokens"] == len(kl) == (len(tokens) - len(rows) if stride == WINDOW else len(tokens) - 1)
    assert report["data"]["stride"] == stride
    for name, values in (("kl", kl), ("reverse_kl", reverse)):
        assert report[f"{name}_mean"] == pytest.approx(np.mean(values), **close)
        assert report[f"{name}_median"] == pytest.approx(np.median(values), **close)
        assert report[f"{name}_p99"] == pytest.approx(np.percentile(values, 99), **close)
    assert report["kl_mean"] > 1e-3
    assert report["top1_agreement"] == pytest.approx(np.mean(top1), **close) and np.mean(top1) < 1
    assert report["top5_agreement"] == pytest.approx(np.mean(top5), **close) and np.mean(top5) < 1
    assert report["nll"] == pytest.approx(np.mean(nll), **close)
    assert report["ppl"] == pytest.approx(math.exp(np.mean(nll)), **close)
    assert report["ppl_increase"] == pytest.approx(math.exp(np.mean(nll) - np.mean(base_nll)) - 1, **close)
    counts, _ = np.histogram(kl, bins=report["kl_histogram"]["edges"])
    assert report["kl_histogram"]["counts"] == counts.tolist() and sum(counts) == len(kl)
    for layer, entry in enumerate(report["layers"]):
        assert entry["layer"] == layer
        assert entry["hidden_rms"] == pytest.approx(math.sqrt(np.mean(hidden[layer])), **close)
        assert entry["router_agreement"] == pytest.approx(np.mean(common[layer]), **close)
        assert entry["router_set_agreement"] == pytest.approx(np.mean(same[layer]), **close)
        assert entry["router_weighted_agreement"] == pytest.approx(np.mean(weighted[layer]), **close)
        mine, theirs = (loads[index, layer] / loads[index, layer].sum() for index in (0, 1))
        assert entry["load"] == pytest.approx(mine.tolist(), **close)
        assert entry["baseline_load"] == pytest.approx(theirs.tolist(), **close)
        assert entry["load_shift"] == pytest.approx(sum(d for d in mine - theirs if d > 0), **close)
        assert entry["load_shift"] > 0
    for name, values in (("router_agreement", common), ("router_set_agreement", same)):
        assert report[name] == pytest.approx(np.mean(values), **close)
        assert 0 < report[name] < 1
    assert report["router_agreement"] < report["router_weighted_agreement"] < 1


@pytest.mark.parametrize("kind", ["qwen3_moe", "deepseek_v3", "gpt_oss", "llama4_text", "llama"])
def test_a_model_against_itself_loses_nothing_at_all(tiny: Tiny, text: Path, kind: str) -> None:
    report = evaluate(tiny(kind), tiny(kind), text)
    for name in ("kl", "reverse_kl"):
        assert [report[f"{name}_{figure}"] for figure in ("mean", "median", "p99")] == [0, 0, 0]
        assert report["intervals"][f"{name}_mean"] == [0, 0]
    assert report["top1_agreement"] == report["top5_agreement"] == 1
    assert report["ppl"] == report["baseline_ppl"] and report["ppl_increase"] == 0
    assert report["kl_histogram"]["counts"] == [report["tokens"]] + [0] * (
        len(report["kl_histogram"]["edges"]) - 2
    )
    assert len(report["layers"]) == 2
    for layer in report["layers"]:
        assert layer["hidden_rms"] == 0
        assert layer.get("load_shift", 0) == 0 and layer.get("router_weighted_agreement", 1) == 1
    names = ("router_agreement", "router_set_agreement", "router_weighted_agreement")
    assert [report[name] for name in names] == ([None] * 3 if kind == "llama" else [1, 1, 1])
    moe_layers = [layer["layer"] for layer in report["layers"] if "load" in layer]
    assert moe_layers == {"llama": [], "deepseek_v3": [1]}.get(kind, [0, 1])
    assert all(sum(report["layers"][layer]["load"]) == pytest.approx(1) for layer in moe_layers)


def test_perplexity_of_the_bf16_model_is_its_loss_in_transformers(tiny: Tiny, text: Path) -> None:
    report = evaluate(tiny("qwen3_moe"), None, text, max_tokens=128)
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(tiny("qwen3_moe"))(TEXT)["input_ids"]
    last = len(tokens) - WINDOW
    rows = [tokens[start : start + WINDOW] for start in (0, last // 3, 2 * last // 3, last)]
    model = transformers_model(tiny("qwen3_moe"))
    with torch.no_grad():
        losses = [float(model(torch.tensor([row]), labels=torch.tensor([row])).loss) for row in rows]
    assert report["nll"] == pytest.approx(np.mean(losses), rel=1e-6)
    assert report["ppl"] == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)
    assert report["baseline"] is None and "kl_mean" not in report and set(report["intervals"]) == {"ppl"}
    assert [sorted(layer) for layer in report["layers"]] == [["layer", "load"]] * 2


def test_doubled_logits_give_the_kl_that_the_logits_alone_predict(
    tiny: Tiny, tmp_path: Path, text: Path
) -> None:
    """A head of twice the weights is exact in bfloat16, and touches no router and no hidden state."""
    source = tiny("qwen3_moe")
    doubled = changed(source, tmp_path / "doubled", lambda name, x: x * 2 if name == "lm_head.weight" else x)
    report = evaluate(doubled, source, text)
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(source)(TEXT)["input_ids"]
    last = len(tokens) - WINDOW
    rows = [tokens[at : at + WINDOW] for at in (index * last // 7 for index in range(8))]
    log_p = torch.cat([item["log_p"][:-1] for item in direct(source, rows)])
    log_q = (2 * log_p).log_softmax(-1)
    expected = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    assert report["kl_mean"] == pytest.approx(float(expected), rel=1e-9)
    assert report["top1_agreement"] == report["router_agreement"] == report["router_set_agreement"] == 1
    assert [layer["hidden_rms"] for layer in report["layers"]] == [0, 0]


def test_one_percent_of_noise_in_the_head_gives_the_predicted_kl(tiny: Tiny) -> None:
    """Independent noise of variance s^2 on every weight moves each logit by s * |h|: to second order the expected KL
    is s^2 |h|^2 (1 - sum p^2) / 2."""
    torch.manual_seed(0)
    source, other = (load_checkpoint(tiny("qwen3_moe"), device=CPU, dtype=torch.float32) for _ in range(2))
    tokens = torch.randint(4, 260, (640,)).tolist()
    head: Any = other.lm_head
    sigma = 0.01 * float(head.weight.std())
    head.weight.data += sigma * torch.randn(head.weight.shape)
    inputs: list[torch.Tensor] = []
    model: Any = source
    hook = model.lm_head.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        p = model(torch.tensor(tokens).reshape(20, 32)).logits[:, :-1].double().softmax(-1)
    hook.remove()
    square = inputs[0][:, :-1].double().square().sum(-1)
    expected = float((sigma**2 * square * (1 - p.square().sum(-1)) / 2).mean())
    metrics = compare_models(other, source, tokens, window=32)
    assert metrics.kl_mean == pytest.approx(expected, rel=0.1)
    assert metrics.reverse_kl_mean == pytest.approx(expected, rel=0.1)
    assert metrics.router_agreement == 1.0


def test_one_percent_of_noise_on_a_hidden_state_is_one_percent(
    tiny: Tiny, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import toolchain.evaluate.run as run

    load, made = run.load_model, []

    def plant(*arguments: Any, **options: Any) -> Any:
        model = load(arguments[0], **{**options, "dtype": torch.float32})
        made.append(model)
        if len(made) == 1:
            generator = torch.Generator().manual_seed(1)

            def disturb(_: Any, __: Any, output: Any) -> Any:
                size = output.square().mean(-1, keepdim=True).sqrt()
                return output + 0.01 * size * torch.randn(output.shape, generator=generator)

            model.model.layers[1].register_forward_hook(disturb)
        return model

    monkeypatch.setattr(run, "load_model", plant)
    report = evaluate(tiny("qwen3"), tiny("qwen3"), text)
    assert report["layers"][0]["hidden_rms"] == 0
    # 256 positions of 128 channels: the root mean square of the noise is known to 0.4 %.
    assert report["layers"][1]["hidden_rms"] == pytest.approx(0.01, rel=0.02)


def test_routers_agree_where_only_what_follows_them_changes(tiny: Tiny, tmp_path: Path, text: Path) -> None:
    source = tiny("qwen3_moe")
    change = noisy(0.3, "lm_head", "layers.1.mlp.experts")
    report = evaluate(changed(source, tmp_path / "other", change), source, text)
    names = ("router_agreement", "router_set_agreement", "router_weighted_agreement")
    assert [report[name] for name in names] == [1, 1, 1]
    assert [layer["load_shift"] for layer in report["layers"]] == [0, 0]
    assert report["layers"][0]["hidden_rms"] == 0 < report["layers"][1]["hidden_rms"]
    assert report["kl_mean"] > 0


@pytest.fixture(scope="module")
def exported(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """NVFP4 with an FP8 KV cache."""
    directory = tmp_path_factory.mktemp("exported") / "out"
    quantize(plan_for(tiny("qwen3_moe"), "nvfp4", kv_cache="fp8", gpu="b200"), directory, device="cpu")
    return directory


def test_variants_are_what_separately_loaded_models_give(
    tiny: Tiny, exported: Path, tmp_path: Path, text: Path
) -> None:
    """The switches of one loaded model, bit for bit: weights alone, all of the target, and all but the KV cache."""
    plain_kv = shutil.copytree(exported, tmp_path / "plain_kv")
    for name in ("hf_quant_config.json", "config.json"):
        value = json.loads((plain_kv / name).read_text())
        value.get("quantization", {}).pop("kv_cache_quant_algo", None)
        value.get("quantization_config", {}).pop("kv_cache_scheme", None)
        (plain_kv / name).write_text(json.dumps(value))
    report = evaluate(exported, tiny("qwen3_moe"), text)
    source = load_checkpoint(tiny("qwen3_moe"), device=CPU)
    models = {
        "target": load_checkpoint(exported, device=CPU),
        "weights": load_checkpoint(exported, device=CPU, emulate_activations=False),
        "kv_none": load_checkpoint(plain_kv, device=CPU),
    }
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(exported)(TEXT)["input_ids"]
    last = len(tokens) - WINDOW
    ids = [token for index in range(8) for token in tokens[index * last // 7 : index * last // 7 + WINDOW]]
    assert set(report["variants"]) == set(models)
    for name, model in models.items():
        apart = compare_models(model, source, ids, window=WINDOW).to_json()
        assert {key: report["variants"][name][key] for key in apart} == apart
    kls = [report["variants"][name]["kl_mean"] for name in ("weights", "kv_none", "target")]
    assert len(set(kls)) == 3 and kls[0] < kls[1]
    assert report["kl_mean"] == report["variants"]["target"]["kl_mean"]
    other = evaluate(exported, tiny("qwen3_moe"), text, emulation="weights")
    assert other["emulation"] == "weights" and other["variants"] == report["variants"]
    assert {key: other[key] for key in other["variants"]["weights"]} == other["variants"]["weights"]


def test_a_cache_that_cannot_be_emulated_leaves_the_weights(
    tiny: Tiny, exported: Path, tmp_path: Path, text: Path
) -> None:
    unknown = shutil.copytree(exported, tmp_path / "unknown")
    value = json.loads((unknown / "hf_quant_config.json").read_text())
    value["quantization"]["kv_cache_quant_algo"] = "INT8"
    (unknown / "hf_quant_config.json").write_text(json.dumps(value))
    with pytest.raises(ToolchainError, match="INT8") as error:
        evaluate(unknown, tiny("qwen3_moe"), text)
    assert error.value.code == "TC-510" and "--emulation weights" in error.value.hint
    report = evaluate(unknown, tiny("qwen3_moe"), text, emulation="weights")
    assert set(report["variants"]) == {"weights"}
    weights = evaluate(exported, tiny("qwen3_moe"), text)["variants"]["weights"]
    assert report["variants"]["weights"] == weights


def test_a_plain_model_has_no_kv_variant_and_one_forward_serves_both(
    tiny: Tiny, tmp_path: Path, text: Path
) -> None:
    other = make_tiny("qwen3_moe", tmp_path / "other", seed=1)
    variants = evaluate(other, tiny("qwen3_moe"), text)["variants"]
    assert set(variants) == {"target", "weights"} and variants["target"] == variants["weights"]


def test_intervals_are_those_of_scipy(tiny: Tiny, tmp_path: Path, text: Path) -> None:
    """Windows are drawn with replacement: the figure is a ratio of sums. scipy draws other windows than we do."""
    from scipy import stats

    source = tiny("qwen3_moe")
    other = changed(source, tmp_path / "other", noisy(0.2, "self_attn"))
    report = evaluate(other, source, text, max_tokens=10_000, window=9)
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(source)(TEXT)["input_ids"]
    rows = [tokens[at : at + 9] for at in range(0, len(tokens), 9)]
    rows = [row for row in rows if len(row) > 1]
    kl = []
    for mine, base in zip(direct(other, rows), direct(source, rows), strict=True):
        q, p = mine["log_p"][:-1], base["log_p"][:-1]
        kl.append((p.exp() * (p - q)).sum(-1))
    sums, counts = np.array([float(row.sum()) for row in kl]), np.array([len(row) for row in kl])
    assert report["bootstrap"]["windows"] == len(sums)

    def ratio(one: np.ndarray, two: np.ndarray, axis: int = -1) -> np.ndarray:
        return one.sum(axis=axis) / two.sum(axis=axis)

    expected = stats.bootstrap(
        (sums, counts), ratio, paired=True, method="percentile", n_resamples=9999, random_state=1
    ).confidence_interval
    low, high = report["intervals"]["kl_mean"]
    width = expected.high - expected.low
    assert low < report["kl_mean"] < high
    assert low == pytest.approx(expected.low, abs=0.1 * width)
    assert high == pytest.approx(expected.high, abs=0.1 * width)
