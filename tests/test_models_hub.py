"""Hub ids, through the real huggingface_hub client, against a hub on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.hub_server import hub_server
from toolchain.models import model_identity, read_model

Tiny = Callable[[str], Path]

SCRIPT = """
import json, sys
from toolchain.core.errors import ToolchainError
from toolchain.models import model_identity, read_model, resolve_model
what, source = sys.argv[1:]
try:
    if what == "resolve":
        result = {"path": str(resolve_model(source))}
    else:
        info = read_model(source, allow_download=what != "cached")
        result = {
            "identity": model_identity(info), "parameters": info.parameters, "weights": info.has_weights,
            "tokenizer": info.has_tokenizer, "template": info.chat_template, "torch": "torch" in sys.modules,
        }
except ToolchainError as error:
    result = error.to_json()
print(json.dumps(result))
"""

Ask = Callable[..., Any]


@pytest.fixture
def hub(tiny: Tiny, tmp_path: Path) -> Iterator[tuple[Ask, list[str]]]:
    """``ask(what, source)`` in a process whose hub is ours and whose cache is empty; and the hub's log."""
    from transformers import AutoModelForCausalLM

    sharded = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(tiny("qwen3_moe")).save_pretrained(sharded, max_shard_size="300KB")
    with hub_server({"tiny/moe": tiny("qwen3_moe"), "tiny/sharded": sharded}) as (endpoint, log):

        def ask(what: str, source: str, **settings: str) -> Any:
            env = {
                **os.environ,
                "HF_ENDPOINT": endpoint,
                "HF_HOME": str(tmp_path / "hf"),
                "HF_HUB_DISABLE_XET": "1",
            }
            env |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
            env.pop("HF_HUB_OFFLINE", None)
            command = [sys.executable, "-c", SCRIPT, what, source]
            done = subprocess.run(command, env=env | settings, capture_output=True, text=True, check=True)
            return json.loads(done.stdout)

        yield ask, log


def test_planning_fetches_headers_and_no_weights(hub: tuple[Ask, list[str]], tiny: Tiny) -> None:
    ask, log = hub
    local = read_model(str(tiny("qwen3_moe")))
    answer = ask("read", "tiny/moe")
    assert answer == {
        "identity": model_identity(local),
        "parameters": local.parameters,
        "weights": True,
        "tokenizer": True,
        "template": True,
        "torch": False,
    }
    weights = [line for line in log if "model.safetensors" in line and line.startswith("GET")]
    fetched = sum(int(line.rpartition(" ")[2]) for line in weights)
    assert 0 < fetched < local.bytes / 4


def test_sharded_model_is_planned_twice(hub: tuple[Ask, list[str]], tiny: Tiny) -> None:
    """The first plan leaves the index in the cache, but no shard: the second must not take it for a download."""
    ask, _ = hub
    first = ask("read", "tiny/sharded")
    assert first["parameters"] == read_model(str(tiny("qwen3_moe"))).parameters
    assert ask("read", "tiny/sharded") == first
    offline = ask("resolve", "tiny/sharded", HF_HUB_OFFLINE="1")
    assert (offline["code"], "safetensors" in offline["message"]) == ("TC-019", True)


def test_snapshot_then_offline(hub: tuple[Ask, list[str]], tiny: Tiny) -> None:
    ask, log = hub
    path = Path(ask("resolve", "tiny/moe")["path"])
    assert (path / "model.safetensors").read_bytes() == (tiny("qwen3_moe") / "model.safetensors").read_bytes()
    asked = len(log)
    offline = ask("read", "tiny/moe", HF_HUB_OFFLINE="1")
    assert offline["identity"] == model_identity(read_model(str(tiny("qwen3_moe"))))
    assert offline == ask("cached", "tiny/moe")
    assert len(log) == asked, "offline mode and the cache ask nobody"


def test_hub_failures_are_one_clear_error(hub: tuple[Ask, list[str]]) -> None:
    ask, _ = hub
    absent = ask("read", "tiny/absent")
    assert absent["code"] == "TC-019"
    assert "tiny/absent" in absent["message"]
    assert "check the path or the id" in absent["hint"]
    offline = ask("read", "tiny/moe", HF_HUB_OFFLINE="1")
    assert (offline["code"], "HF_HUB_OFFLINE" in offline["hint"]) == ("TC-019", True)
    unreachable = ask("read", "tiny/moe", HF_ENDPOINT="http://127.0.0.1:9")
    assert unreachable["code"] == "TC-019"
