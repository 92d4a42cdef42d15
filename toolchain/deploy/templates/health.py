#!/usr/bin/env python3
"""Is this server able to answer? Sends one real request and judges the answer; exit status 0 or 1.

    health.py --triton http://127.0.0.1:8000                    Triton, model tensorrt_llm (llmapi layout and local)
    health.py --triton http://127.0.0.1:8000 --model ensemble   Triton, TensorRT engines (inflight batcher)
    health.py --openai http://127.0.0.1:8000                    trtllm-serve, vLLM, SGLang, NIM

A server that says "ready" may be unable to answer: a Python stub of Triton that died is never restarted, and the
readiness endpoints stay 200. So nothing but an inference counts. Needs Python 3.8 and its standard library alone, since
it runs inside whatever image serves. Without ``--expect`` any text passes, an empty one too (an answer may begin with
the end of sequence); with it the greedy answer must hold that text.
"""

from __future__ import annotations

import argparse
import json
import sys
import urllib.error
import urllib.request

PROMPT = "The capital of France is"
LISTING_S = 5.0
"""Naming the models is no work: a server that takes longer for it has a problem."""


class Unhealthy(Exception):
    """Why the server does not count as healthy."""


def ask(url: str, body: dict | None, timeout_s: float) -> dict:
    """The JSON object that ``url`` answers with; Unhealthy for anything else."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers={"Content-Type": "application/json"})
    try:
        # No proxy of the environment: the server is on this machine.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=timeout_s) as response:
            answer = json.loads(response.read())
    except urllib.error.HTTPError as error:
        raise Unhealthy(f"{url}: status {error.code}: {error.read(300).decode(errors='replace')}") from error
    except (OSError, ValueError) as error:
        raise Unhealthy(f"{url}: {error}") from error
    if not isinstance(answer, dict):
        raise Unhealthy(f"{url}: {str(answer)[:300]}, expected an object")
    if answer.get("error"):  # Triton says so with status 200 where a model answers several times
        raise Unhealthy(f"{url}: {str(answer['error'])[:300]}")
    return answer


def triton(base: str, model: str, prompt: str, tokens: int, timeout_s: float) -> object:
    """The text of one answer of a Triton model; the two layouts call the limit differently."""
    limit = "max_tokens" if model == "ensemble" else "sampling_param_max_tokens"
    body = {"text_input": prompt, limit: tokens}
    return ask(f"{base}/v2/models/{model}/generate", body, timeout_s).get("text_output")


def openai(base: str, model: str, prompt: str, tokens: int, timeout_s: float) -> object:
    """The text of one completion; without a name, of the first model that the server lists."""
    if not model:
        listed = ask(f"{base}/v1/models", None, min(timeout_s, LISTING_S)).get("data") or [{}]
        model = listed[0].get("id", "")
    body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0}
    choices = ask(f"{base}/v1/completions", body, timeout_s).get("choices") or [{}]
    return choices[0].get("text")


def check(options: argparse.Namespace) -> str:
    """The answer, once it has passed; Unhealthy says what is wrong with it."""
    call = (options.prompt, options.max_tokens, options.timeout)
    if options.triton:
        text = triton(options.triton.rstrip("/"), options.model or "tensorrt_llm", *call)
    else:
        text = openai(options.openai.rstrip("/"), options.model, *call)
    if not isinstance(text, str):
        raise Unhealthy(f"the answer holds no text, but {json.dumps(text)}")
    if options.expect and options.expect not in text:
        raise Unhealthy(f"the answer is {text!r}, expected {options.expect!r} in it")
    return text


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Health by inference.")
    server = parser.add_mutually_exclusive_group(required=True)
    server.add_argument("--triton", metavar="URL", help="HTTP endpoint of a tritonserver")
    server.add_argument("--openai", metavar="URL", help="HTTP endpoint of an OpenAI-compatible server")
    parser.add_argument(
        "--model", default="", help="default: tensorrt_llm, or the first that the server lists"
    )
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--max-tokens", type=int, default=1)
    parser.add_argument("--expect", default="", help="text that the answer must hold")
    parser.add_argument("--timeout", type=float, default=30.0, help="seconds for each request")
    return parser.parse_args()


def main() -> int:
    try:
        text = check(arguments())
    except Unhealthy as problem:
        sys.stderr.write(f"unhealthy: {problem}\n")
        return 1
    sys.stdout.write(f"healthy: {text!r}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
