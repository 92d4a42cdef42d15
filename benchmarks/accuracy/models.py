"""Train the models once, into ``build/accuracy/models``; what exists and is unchanged is kept."""

from __future__ import annotations

import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.accuracy.architectures import COMMON, Architecture
from benchmarks.accuracy.statistics import describe_tensors
from toolchain.core.environment import package_versions
from toolchain.core.files import atomic_directory, atomic_write_json, read_json, sha256_json
from toolchain.demo import train as demo
from toolchain.demo.corpus import Corpus, read_corpus
from toolchain.modeling.loading import quiet_transformers

RECORD = "model.json"
TOKENS_PER_STEP = 1024
SHORT, LONG = 128, 512
"""Window lengths: most steps see many short windows, the last ``LONG_SHARE`` the length that is judged on."""
LONG_SHARE = 0.35
WARMUP = 120
WEIGHT_DECAY = 0.1
SEED = 0


def make_model(architecture: Architecture, directory: Path) -> dict[str, Any]:
    """Train into ``directory`` (hub layout, bf16, tokenizer, texts) and return its record; resumable."""
    corpus = read_corpus()
    training = [TOKENS_PER_STEP, SHORT, LONG, LONG_SHARE, WARMUP, WEIGHT_DECAY, SEED]
    identity = sha256_json([asdict(architecture), COMMON, training, corpus.train, corpus.held_out])
    record = directory / RECORD
    if record.is_file() and read_json(record)["identity"] == identity:
        return dict(read_json(record))
    with atomic_directory(directory, force=record.is_file()) as target:
        started = time.monotonic()
        result = _make(architecture, corpus, target)
        seconds = round(time.monotonic() - started, 1)
        atomic_write_json(
            target / RECORD,
            {
                "name": architecture.name,
                "identity": identity,
                **result,
                "seconds": seconds,
                "versions": package_versions(),
            },
        )
    return dict(read_json(record))


def _make(architecture: Architecture, corpus: Corpus, directory: Path) -> dict[str, Any]:
    tokenizer = demo._train_tokenizer(directory, corpus)
    train, held_out = (demo._encode(tokenizer, texts) for texts in (corpus.train, corpus.held_out))
    windows = demo._windows(held_out)
    model = new_model(architecture)
    _optimise(model, architecture, train)
    perplexity = _perplexity(model, windows)
    unigram = demo._unigram_perplexity(train, windows)
    print(f"{architecture.name}: held-out perplexity {perplexity:.2f}, unigram {unigram:.1f}", flush=True)
    if hasattr(model.config, "output_router_logits"):
        model.config.output_router_logits = False
    tensors = describe_tensors(model, windows[:8])
    model.to(torch.bfloat16).save_pretrained(directory)
    demo._write_texts(directory / "calibration.jsonl", corpus.train)
    demo._write_texts(directory / "evaluation.jsonl", corpus.held_out)
    return {
        "held_out_perplexity": perplexity,
        "unigram_perplexity": unigram,
        "held_out_tokens": windows.numel(),
        "training_tokens": len(train),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "tensors": tensors,
    }


def new_model(architecture: Architecture) -> Any:
    import transformers

    quiet_transformers()
    torch.manual_seed(SEED)
    settings = {**COMMON, **architecture.settings}
    if architecture.aux_loss:
        settings |= {"router_aux_loss_coef": architecture.aux_loss, "output_router_logits": True}
    config = getattr(transformers, f"{architecture.prefix}Config")(**settings)
    # The default grouped matmul is ten times slower than eager on a CPU.
    config._experts_implementation = "eager"
    return getattr(transformers, f"{architecture.prefix}ForCausalLM")(config)


def _optimise(model: Any, architecture: Architecture, tokens: torch.Tensor) -> None:
    """AdamW with warm-up and cosine decay; windows drawn with replacement from the token stream."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}],
        lr=architecture.peak_rate,
        betas=(0.9, 0.95),
    )
    steps = architecture.steps
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    generator = torch.Generator().manual_seed(SEED)
    balance = _BiasBalance(model, architecture.bias_rate)
    model.train()
    started = time.monotonic()
    for step in range(steps):
        batch = _draw(tokens, step >= steps * (1 - LONG_SHARE), generator)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        balance.step()
        if step % 50 == 0 or step == steps - 1:
            elapsed = time.monotonic() - started
            print(f"{architecture.name} step {step} loss {loss.item():.3f} {elapsed:.0f} s", flush=True)
    balance.close()
    model.eval()


def _draw(tokens: torch.Tensor, long: bool, generator: torch.Generator) -> torch.Tensor:
    length = LONG if long else SHORT
    starts = torch.randint(0, len(tokens) - length, (TOKENS_PER_STEP // length, 1), generator=generator)
    return tokens[starts + torch.arange(length)]


def _rate(step: int, steps: int) -> float:
    if step < WARMUP:
        return (step + 1) / WARMUP
    return 0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / (steps - WARMUP)))


class _BiasBalance:
    """DeepSeek-V3's balancing without a loss: an overloaded expert's correction bias falls, an idle one's rises."""

    def __init__(self, model: Any, rate: float) -> None:
        self.rate = rate
        self.loads: dict[Any, torch.Tensor] = {}
        self.hooks = []
        for layer in model.model.layers if rate else ():
            gate = getattr(layer.mlp, "gate", None)
            if hasattr(gate, "e_score_correction_bias"):
                self.hooks.append(layer.mlp.experts.register_forward_pre_hook(self._count(gate)))

    def _count(self, gate: Any) -> Any:
        def count(module: Any, arguments: tuple[Any, ...]) -> None:
            experts = len(gate.e_score_correction_bias)
            self.loads[gate] = torch.bincount(arguments[1].flatten(), minlength=experts).float()

        return count

    @torch.no_grad()
    def step(self) -> None:
        for gate, load in self.loads.items():
            gate.e_score_correction_bias += self.rate * torch.sign(load.mean() - load)

    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()


@torch.no_grad()
def _perplexity(model: Any, windows: torch.Tensor) -> float:
    """exp of the mean next-token loss [windows, length], without any auxiliary loss."""
    total, count = 0.0, 0
    for part in windows.split(8):
        logits = model(input_ids=part).logits[:, :-1].float()
        total += float(
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum")
        )
        count += part[:, 1:].numel()
    return math.exp(total / count)
