"""toolchain generate"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from toolchain.cli.options import ENGINE, device_option, json_option
from toolchain.cli.output import Terminal, emit, write_data
from toolchain.cli.running import kernel_options
from toolchain.core.errors import UsageError


@click.command(name="generate")
@click.argument("engine", type=ENGINE)
@click.option("--prompt", required=True, help="Text to go on from.")
@click.option("--max-tokens", type=int, help="Length of the answer; default: 64, or what the prompt leaves.")
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-k", type=int, default=0, show_default=True, help="0: no limit.")
@click.option("--top-p", type=float, default=1.0, show_default=True)
@click.option("--seed", type=int, help="Seed of the sampling.")
@click.option("--stop", multiple=True, help="Text that ends the answer; may be given more than once.")
@click.option("--chat", is_flag=True, help="Send the prompt as a user message through the chat template.")
@device_option
@kernel_options
@json_option
def command(
    engine: Path,
    prompt: str,
    device: str,
    kernels: str,
    kv_cache: str,
    kv_layout: str,
    chat: bool,
    as_json: bool,
    **sampling: Any,
) -> None:
    """Generate text with ENGINE (an engine or checkpoint directory) in this process, streamed as it comes."""
    from toolchain.runtime.engine import LocalEngine
    from toolchain.runtime.threads import limit_threads
    from toolchain.runtime.types import SamplingParams
    from toolchain.runtime.ways import Wish

    params = SamplingParams(**sampling)
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise UsageError("the prompt is not UTF-8 text", hint="check the terminal's encoding", code="TC-503")
    wish = Wish(kernels=kernels, kv_cache=kv_cache, kv_layout=kv_layout)
    terminal = Terminal()
    with LocalEngine.load(engine, device=device, wish=wish, progress=terminal) as local:
        for note in local.notes:
            terminal.note(note)
        limit_threads(local.model)
        asked: Any = local.apply_chat_template([{"role": "user", "content": prompt}]) if chat else prompt
        if as_json:
            answer = local.generate(asked, params)
            value = {
                "text": answer.text,
                "token_ids": list(answer.token_ids),
                "prompt_tokens": answer.prompt_tokens,
                "finish_reason": answer.finish_reason,
            }
            emit(value, True, "")
            return
        for chunk in local.stream(asked, params):
            write_data(chunk.text, end="")
        write_data("")
