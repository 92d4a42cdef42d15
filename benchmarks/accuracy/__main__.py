"""python -m benchmarks.accuracy models | peers | run | table. See README.md."""

from __future__ import annotations

import argparse
import os
from fnmatch import fnmatch

os.environ.setdefault("OMP_NUM_THREADS", "1")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    models = commands.add_parser("models", help="train the models that do not exist yet")
    models.add_argument("--models", default="*", help="names or patterns, with commas")
    commands.add_parser("peers", help="install llm-compressor into an environment of its own")
    run = commands.add_parser("run", help="measure what is not measured yet")
    run.add_argument("--models", default="*")
    run.add_argument("--methods", default="*", help="names or patterns, with commas: modelopt-nvfp4-*,ours-*")
    run.add_argument("--seeds", default="", help="0,1,2; default: each method's own")
    run.add_argument("--force", action="store_true", help="measure again")
    run.add_argument("--list", action="store_true", help="print the runs and their state only")
    one = commands.add_parser("one", help="one measurement in this process")
    one.add_argument("model")
    one.add_argument("method")
    one.add_argument("seed", type=int)
    table = commands.add_parser("table", help="assemble the result file and print the table")
    table.add_argument("--dry-run", action="store_true", help="print only")
    options = parser.parse_args()
    {"models": _models, "peers": _peers, "run": _run, "one": _one, "table": _table}[options.command](options)


def chosen(names: list[str], patterns: str) -> list[str]:
    """The names that fit one of the comma-separated patterns, in their own order."""
    found = [name for name in names if any(fnmatch(name, pattern) for pattern in patterns.split(","))]
    if not found:
        raise SystemExit(f"nothing is called {patterns!r}; there are: {', '.join(names)}")
    return found


def _models(options: argparse.Namespace) -> None:
    from benchmarks.accuracy.architectures import BY_NAME
    from benchmarks.accuracy.models import make_model
    from benchmarks.accuracy.places import MODELS

    for name in chosen(list(BY_NAME), options.models):
        record = make_model(BY_NAME[name], MODELS / name)
        print(
            f"{name}: { ({k: v for k, v in record.items() if k not in ('identity', 'versions')}) }",
            flush=True,
        )


def _peers(options: argparse.Namespace) -> None:
    from benchmarks.accuracy.peers import make_environment

    make_environment()


def _run(options: argparse.Namespace) -> None:
    from benchmarks.accuracy.architectures import BY_NAME
    from benchmarks.accuracy.methods import BY_NAME as METHODS
    from benchmarks.accuracy.methods import EXPERTS
    from benchmarks.accuracy.places import MODELS, run_file
    from benchmarks.accuracy.worker import measure_in_process

    models = [name for name in chosen(list(BY_NAME), options.models) if (MODELS / name).is_dir()]
    seeds = [int(seed) for seed in options.seeds.split(",") if seed]
    failed = 0
    for method in chosen(list(METHODS), options.methods):
        for model in models:
            if METHODS[method].policy == EXPERTS and not BY_NAME[model].moe:
                continue
            for seed in METHODS[method].seeds:
                if seeds and seed not in seeds:
                    continue
                done = run_file(model, method, seed).is_file()
                if options.list:
                    print(f"{'done' if done else 'open'} {model} {method} {seed}")
                elif options.force or not done:
                    problem = measure_in_process(model, method, seed)
                    failed += problem is not None
                    print(f"{model} {method} {seed}: {problem or _line(model, method, seed)}", flush=True)
    if failed:
        raise SystemExit(f"{failed} runs failed")


def _line(model: str, method: str, seed: int) -> str:
    from benchmarks.accuracy.places import run_file
    from toolchain.core.files import read_json

    found = read_json(run_file(model, method, seed))
    return (
        f"KL {found['kl_mean']:.5f} [{found['kl_low']:.5f}, {found['kl_high']:.5f}], ppl {found['ppl']:.3f} "
        f"({found['baseline_ppl']:.3f}), {found['judged']}"
    )


def _one(options: argparse.Namespace) -> None:
    from benchmarks.accuracy.worker import measure

    measure(options.model, options.method, options.seed)


def _table(options: argparse.Namespace) -> None:
    from benchmarks.accuracy.table import assemble, render, write

    result = assemble()
    print(render(result))
    if not options.dry_run:
        write(result)


if __name__ == "__main__":
    main()
