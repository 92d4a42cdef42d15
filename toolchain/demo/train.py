"""Train the demo MoE: a small Qwen3-MoE, from scratch, on the standard library's source. Seeded."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import torch

from toolchain.core.environment import package_versions
from toolchain.core.files import (
    atomic_directory,
    atomic_write_json,
    atomic_write_text,
    read_json,
    sha256_json,
)
from toolchain.core.progress import Progress, Silent
from toolchain.demo.corpus import Corpus, read_corpus
from toolchain.modeling.loading import quiet_transformers

RECIPE: dict[str, Any] = {
    "vocab_size": 2048,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "intermediate_size": 256,
    "moe_intermediate_size": 128,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "max_position_embeddings": 2048,
    "router_aux_loss_coef": 0.02,
    "output_router_logits": True,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
"""Every width is a multiple of 128, so that every format applies."""
STEPS, BATCH, LENGTH, PEAK_LR, WARMUP = 1000, 8, 128, 8e-3, 150
"""Many small steps: at equal time 8 x 128 tokens reached half the perplexity of 8 x 256. About 95 s on 2 cores."""
EVALUATION_WINDOWS, EVALUATION_LENGTH = 128, 512
"""Windows spread evenly over the held-out files."""
END, PAD = "<|endoftext|>", "<|pad|>"
RECORD = "demo.json"


def make_demo(
    output: Path, *, seed: int = 0, force: bool = False, progress: Progress | None = None
) -> dict[str, Any]:
    """Train into ``output`` (a plain Hugging Face directory) and return its record; an unchanged one is reused.

    The record holds held-out perplexity of the model and of a unigram model on the same tokens.
    """
    progress = progress or Silent()
    corpus = read_corpus()
    identity = sha256_json(
        [RECIPE, STEPS, BATCH, LENGTH, PEAK_LR, WARMUP, seed, corpus.train, corpus.held_out]
    )
    record = output / RECORD
    if not force and record.is_file() and read_json(record).get("identity") == identity:
        progress.note(f"demo model unchanged: {output}")
        return dict(read_json(record))
    with atomic_directory(output, force=force or record.is_file()) as directory:
        started = time.monotonic()
        result = _train(directory, corpus, seed, progress)
        result |= {"identity": identity, "seconds": round(time.monotonic() - started, 1), "seed": seed}
        atomic_write_json(directory / RECORD, {**result, "versions": package_versions()})
    return dict(read_json(record))


def _train(directory: Path, corpus: Corpus, seed: int, progress: Progress) -> dict[str, Any]:
    tokenizer = _train_tokenizer(directory, corpus)
    train = _encode(tokenizer, corpus.train)
    held_out = _windows(_encode(tokenizer, corpus.held_out))
    progress.note(f"demo: {len(train)} training tokens, judged on {held_out.numel()} held-out tokens")
    model = _new_model(seed)
    _optimise(model, train, seed, progress)
    perplexity = _perplexity(model, held_out)
    unigram = _unigram_perplexity(train, held_out)
    progress.note(
        f"held-out perplexity {perplexity:.1f}, unigram {unigram:.1f}: 1/{unigram / perplexity:.1f}"
    )
    model.config.output_router_logits = False
    model.to(torch.bfloat16).save_pretrained(directory)
    _write_texts(directory / "calibration.jsonl", corpus.train)
    _write_texts(directory / "evaluation.jsonl", corpus.held_out)
    return {
        "held_out_perplexity": perplexity,
        "unigram_perplexity": unigram,
        "held_out_tokens": held_out.numel(),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def _train_tokenizer(directory: Path, corpus: Corpus) -> Any:
    """Byte-level BPE on the training files, as a fast tokenizer with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=RECIPE["vocab_size"],
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus.train, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=PAD)
    fast.chat_template = (
        "{% for message in messages %}# {{ message['role'] }}\n{{ message['content'] }}\n{% endfor %}"
    )
    fast.save_pretrained(directory)
    return fast


def _encode(tokenizer: Any, texts: list[str]) -> torch.Tensor:
    tokens: list[int] = []
    for encoded in tokenizer(texts, add_special_tokens=False).input_ids:
        tokens += [*encoded, tokenizer.eos_token_id]
    return torch.tensor(tokens)


def _new_model(seed: int) -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    quiet_transformers()
    torch.manual_seed(seed)
    config = Qwen3MoeConfig(**RECIPE, eos_token_id=0, pad_token_id=1, bos_token_id=None)
    # The default grouped matmul is ten times slower than eager on a CPU.
    config._experts_implementation = "eager"
    return Qwen3MoeForCausalLM(config)


def _optimise(model: Any, tokens: torch.Tensor, seed: int, progress: Progress) -> None:
    """AdamW with warm-up and cosine decay; windows drawn with replacement from the token stream."""
    decay = [p for p in model.parameters() if p.dim() >= 2]
    rest = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}],
        lr=PEAK_LR,
        betas=(0.9, 0.95),
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _rate)
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.arange(LENGTH)
    model.train()
    for _ in progress.track(range(STEPS), description="train demo MoE", total=STEPS):
        starts = torch.randint(0, len(tokens) - LENGTH, (BATCH, 1), generator=generator)
        batch = tokens[starts + offsets]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
    model.eval()


def _rate(step: int) -> float:
    if step < WARMUP:
        return (step + 1) / WARMUP
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP)))


def _windows(tokens: torch.Tensor) -> torch.Tensor:
    """[windows, length] runs of tokens from all over the text."""
    count = min(EVALUATION_WINDOWS, len(tokens) // EVALUATION_LENGTH)
    starts = torch.linspace(0, len(tokens) - EVALUATION_LENGTH, count).long()
    return tokens[starts.unsqueeze(1) + torch.arange(EVALUATION_LENGTH)]


@torch.no_grad()
def _perplexity(model: Any, windows: torch.Tensor) -> float:
    """exp of the mean next-token loss, without the router's auxiliary loss."""
    parts = windows.split(8)
    losses = [
        float(model(input_ids=part, labels=part, output_router_logits=False).loss) * len(part)
        for part in parts
    ]
    return math.exp(sum(losses) / len(windows))


def _unigram_perplexity(train: torch.Tensor, held_out: torch.Tensor) -> float:
    """Perplexity of the training frequencies (add-one smoothed) on the held-out tokens."""
    counts = torch.bincount(train, minlength=RECIPE["vocab_size"]).double() + 1
    return math.exp(-float((counts / counts.sum()).log()[held_out[:, 1:]].mean()))


def _write_texts(path: Path, texts: list[str]) -> None:
    atomic_write_text(path, "".join(json.dumps({"text": text}) + "\n" for text in texts))
