"""Decode tokens per second of a model in the shape of Qwen3-30B-A3B with random weights, ours and BF16 transformers."""

from __future__ import annotations

import gc
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernels.experts import config_directory
from benchmarks.kernels.layers import stored

QWEN3_30B: dict[str, Any] = {
    "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "dtype": "bfloat16", "vocab_size": 151936,
    "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_hidden_layers": 48,
    "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8,
    "norm_topk_prob": True, "max_position_embeddings": 4096, "tie_word_embeddings": False, "rms_norm_eps": 1e-6,
    "eos_token_id": None, "bos_token_id": None, "decoder_sparse_step": 1, "mlp_only_layers": [],
}  # fmt: skip
SMOKE: dict[str, Any] = {
    **QWEN3_30B, "vocab_size": 320, "hidden_size": 128, "moe_intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip
PROMPT = 128


def packed_model(directory: Path, format: str, device: torch.device, dtype: torch.dtype) -> Any:
    """Random packed experts and attention; norms, router, embedding and head in ``dtype``."""
    from toolchain.codecs import get_codec
    from toolchain.families import get_family
    from toolchain.modeling.filling import empty_model
    from toolchain.modeling.packed.chooser import Chooser, processors_of
    from toolchain.modeling.packed.filling import PackedFiller
    from toolchain.modeling.packed.routers import fuse_routers

    model = empty_model(directory, dtype, on_meta=True)
    filler = PackedFiller(
        model,
        get_family("qwen3_moe", "Qwen3MoeForCausalLM", []),
        dtype,
        device,
        Chooser(processors=processors_of(device)),
    )
    codec = get_codec(format)
    for name, module in list(model.named_modules()):
        linear = isinstance(module, torch.nn.Linear)
        if linear and name != "lm_head":
            n, k = module.weight.shape
            filler.fill(name, stored(format, n, k, device), codec)
        else:
            for suffix, parameter in module.named_parameters(recurse=False):
                value = torch.randn(parameter.shape, device=device) * parameter.shape[-1] ** -0.5
                filler.fill_plain(name, {suffix: value + 1 if parameter.dim() == 1 else value})
    filler.finish_experts()
    filler.finish(directory)
    fuse_routers(model)
    model.toolchain_chooser = filler.chooser
    return model.eval().to(device)


def ours(model: Any, device: torch.device, batch: int, count: int) -> float:
    """Tokens per second of decoding, of ``batch`` requests at once, by the engine that serves."""
    from toolchain.runtime.location import Limits
    from toolchain.runtime.model import Runner
    from toolchain.runtime.paged.setup import Paging

    length = PROMPT + count + 8
    limits = Limits(max_batch_size=batch, max_seq_len=length)
    paging = Paging(max_batch_size=limits.max_batch_size, max_seq_len=limits.max_seq_len)
    runner = Runner(model=model, device=device, paging=paging)
    runner.probe()
    assert runner.paged is not None, runner.notes
    decoder, pool = runner.paged.decoder, runner.paged.pool
    table = runner.paged.pages.table
    owners = [object() for _ in range(batch)]
    for owner in owners:
        holding = pool.reserve(owner, length)
        assert holding is not None
        table[holding.slot, : len(holding.pages)] = torch.tensor(
            holding.pages, dtype=torch.int32, device=device
        )
    slots = [pool.of(owner).slot for owner in owners]
    tokens, done = [1] * batch, PROMPT
    with torch.inference_mode():
        for _ in range(4):
            done += 1
            tokens = decoder.step(tokens, slots, [done] * batch).argmax(-1).tolist()
        started = time.perf_counter()
        for _ in range(count):
            done += 1
            tokens = decoder.step(tokens, slots, [done] * batch).argmax(-1).tolist()
        seconds = time.perf_counter() - started
    model.set_attn_implementation("sdpa")
    return batch * count / seconds


def theirs(
    directory: Path, device: torch.device, dtype: torch.dtype, batches: tuple[int, ...], count: int
) -> dict[int, float]:
    """The same of transformers in BF16 with its grouped matmul, by ``generate``; prompts are not counted."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    config = AutoConfig.from_pretrained(directory)
    with torch.device(device), no_init_weights():
        model: Any = AutoModelForCausalLM.from_config(
            config, dtype=dtype, experts_implementation="grouped_mm"
        ).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter.data, mean=float(parameter.dim() == 1), std=0.02)
    found = {}
    for batch in batches:
        ids = torch.ones((batch, PROMPT), dtype=torch.long, device=device)

        def seconds(new: int, ids: torch.Tensor = ids) -> float:
            started = time.perf_counter()
            with torch.inference_mode():
                model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=new,
                    min_new_tokens=new,
                    do_sample=False,
                )
            if device.type == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter() - started

        seconds(4)
        short = seconds(4)
        found[batch] = batch * count / (seconds(4 + count) - short)
    return found


def measure_decoding(
    formats: tuple[str, ...], device: torch.device, batches: tuple[int, ...], *, smoke: bool
) -> list[dict[str, Any]]:
    """A row for each format and batch, with BF16 transformers of the same run."""
    from toolchain.core.progress import Silent
    from toolchain.kernels.settings import default
    from toolchain.kernels.table import settings_of
    from toolchain.modeling.packed.loading import packed_bytes
    from toolchain.modeling.packed.tuning import tune

    config, count = (SMOKE, 2) if smoke else (QWEN3_30B, 64)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rows = []
    with config_directory(config) as folder:
        plain = theirs(Path(folder), device, dtype, batches, count)
        for format in formats:
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
            model = packed_model(Path(folder), format, device, dtype)
            pick = {"pick": lambda *shape: iter([default(*shape)])} if smoke else {}
            found = tune(model, tokens=batches, device=device, progress=Silent(), **pick)
            model.toolchain_chooser.use(settings_of(found.table))
            for batch in batches:
                speed = ours(model, device, batch, count)
                held = torch.cuda.memory_allocated(device) if device.type == "cuda" else None
                rows.append(
                    {
                        "format": format,
                        "batch": batch,
                        "tokens_per_s": speed,
                        "bf16_tokens_per_s": plain[batch],
                        "weights_bytes": packed_bytes(model),
                        "weights_allocated_bytes": held,
                    }
                )
            del model
    return rows
