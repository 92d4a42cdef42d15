"""python -m benchmarks.serving run | table: our load generator against aiperf on the same server. See README.md."""

from __future__ import annotations

import argparse
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="measure in turns on one running server, and write the result file")
    run.add_argument("--engine", default="engines/demo-moe-nvfp4")
    run.add_argument("--rounds", type=int, default=5)
    run.add_argument(
        "--targets", default="paced-http,paced-openai,paced-triton,triton-http,openai", help="with commas"
    )
    run.add_argument("--concurrency", default="1,4", help="with commas")
    run.add_argument("--requests", type=int, default=40)
    run.add_argument("--prompt-tokens", type=int, default=512)
    run.add_argument("--output-tokens", type=int, default=64)
    table = commands.add_parser("table", help="print the table of the result file")
    table.add_argument("--file", default=None)
    options = parser.parse_args()
    from benchmarks.serving.agreement import RESULT, measure
    from benchmarks.serving.table import render
    from toolchain.core.files import read_json

    if options.command == "run":
        measure(
            Path(options.engine),
            rounds=options.rounds,
            targets=options.targets.split(","),
            concurrency=tuple(map(int, options.concurrency.split(","))),
            requests=options.requests,
            lengths=(options.prompt_tokens, options.output_tokens),
        )
        print(render(read_json(RESULT)))
    else:
        print(render(read_json(Path(options.file) if options.file else RESULT)))


if __name__ == "__main__":
    main()
