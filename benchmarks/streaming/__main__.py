"""python -m benchmarks.streaming models | peers | run | device | table. See README.md."""

from __future__ import annotations

import argparse
import subprocess
import sys
from fnmatch import fnmatch


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.streaming", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    models = commands.add_parser("models", help="write synthetic checkpoints, to look at or to keep")
    models.add_argument("--models", default="*-1gb", help="names or patterns, with commas")
    commands.add_parser("peers", help="install llm-compressor into an environment of its own")
    run = commands.add_parser("run", help="measure what is not measured yet")
    run.add_argument("--models", default="*")
    run.add_argument("--methods", default="*", help="names or patterns, with commas: ours-*,modelopt-*")
    run.add_argument(
        "--rounds", type=int, default=3, help="in turns; 16 GB is measured once, peers at 4 GB as well"
    )
    run.add_argument("--keep", action="store_true", help="leave the models on the disk")
    run.add_argument("--force", action="store_true", help="measure again")
    device = commands.add_parser(
        "device", help="GB/s from disk and from memory on one device, and a projection"
    )
    device.add_argument("--device", default="auto")
    device.add_argument("--size-gb", type=int, default=4)
    device.add_argument("--only-cuda", action="store_true", help="do nothing without CUDA")
    table = commands.add_parser("table", help="assemble the result file and print the table")
    table.add_argument("--dry-run", action="store_true", help="print only")
    options = parser.parse_args()
    {"models": _models, "peers": _peers, "run": _run, "device": _device, "table": _table}[options.command](
        options
    )


def chosen(names: list[str], patterns: str) -> list[str]:
    """The names that fit one of the comma-separated patterns, in their own order."""
    found = [name for name in names if any(fnmatch(name, pattern) for pattern in patterns.split(","))]
    if not found:
        raise SystemExit(f"nothing is called {patterns!r}; there are: {', '.join(names)}")
    return found


def _all_models() -> dict[str, tuple[str, int]]:
    from benchmarks.streaming.architectures import ARCHITECTURES, SIZES_GB, model_name

    return {
        model_name(design.name, size): (design.name, size) for size in SIZES_GB for design in ARCHITECTURES
    }


def _models(options: argparse.Namespace) -> None:
    from benchmarks.streaming.models import make_model
    from benchmarks.streaming.places import MODELS

    known = _all_models()
    for name in chosen(list(known), options.models):
        print(f"{name}: {make_model(*known[name], MODELS / name)}", flush=True)


def _peers(options: argparse.Namespace) -> None:
    from benchmarks.accuracy.peers import make_environment

    make_environment()


def _run(options: argparse.Namespace) -> None:
    """Nothing heavy is imported here: see measure.py."""
    from benchmarks.accuracy.places import PEER_PYTHON
    from benchmarks.streaming.methods import BY_NAME
    from benchmarks.streaming.places import ROOT
    from benchmarks.streaming.runs import measure_all

    known, methods = _all_models(), chosen(list(BY_NAME), options.methods)
    if not PEER_PYTHON.is_file() and any(name.startswith("llmcompressor") for name in methods):
        raise SystemExit(f"{PEER_PYTHON} does not exist; `python -m benchmarks.streaming peers` makes it")
    failed = measure_all(
        [known[name] for name in chosen(list(known), options.models)],
        methods,
        rounds=options.rounds,
        keep=options.keep,
        force=options.force,
    )
    # On a machine with CUDA its rates as well; in another process, because it imports torch.
    subprocess.run(
        [sys.executable, "-m", "benchmarks.streaming", "device", "--only-cuda"], cwd=ROOT, check=True
    )
    if failed:
        raise SystemExit(f"{failed} methods failed")


def _device(options: argparse.Namespace) -> None:
    import torch

    if options.only_cuda and not torch.cuda.is_available():
        return
    from benchmarks.streaming.device import measure
    from benchmarks.streaming.table import show

    print(show(measure(options.device, options.size_gb)))


def _table(options: argparse.Namespace) -> None:
    from benchmarks.streaming.table import assemble, render, write

    result = assemble()
    print(render(result))
    if not options.dry_run:
        write(result)


if __name__ == "__main__":
    main()
