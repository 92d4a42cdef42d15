"""The command line: parse, call one stage, print. Commands are imported when they are called, not before."""

from __future__ import annotations

import importlib
import sys
from typing import IO, Any

import click

from toolchain import __version__
from toolchain.cli.output import stdout_for_data
from toolchain.core.errors import ToolchainError, UsageError

COMMANDS: dict[str, tuple[str, str]] = {
    "doctor": ("doctor", "Show what this machine has and what can run here."),
    "list": ("list_", "List formats, families, targets or gpus."),
    "support": ("support", "Show which format runs on which GPU with which TensorRT-LLM."),
    "demo": ("demo", "Train the demo MoE, a plain Hugging Face directory."),
    "plan": ("plan", "Say what would be done to MODEL, what it takes and what is wrong. Reads no weight."),
    "quantize": ("quantize", "Quantize MODEL into a checkpoint directory."),
    "qat": ("qat", "Train with fake quantization (QAD, QAT), then make the engine."),
    "verify": ("verify", "Audit the written bytes of a quantized checkpoint."),
    "convert": ("convert", "Write a compressed-tensors checkpoint (llm-compressor) in ModelOpt's layout."),
    "evaluate": ("evaluate", "Run a checkpoint on held-out text: perplexity, KL, agreement."),
    "sensitivity": ("sensitivity", "Measure what each layer group loses when only it is quantized."),
    "build": ("build", "Make an engine of a verified checkpoint."),
    "engine": ("engine", "The whole picture: plan, quantize, verify, evaluate, build, triton."),
    "sweep": ("sweep", "A grid of engines (models x formats x recipes), measured alike, in one table."),
    "generate": ("generate", "Generate text with an engine in this process."),
    "triton": ("triton", "Render, update or lint a Triton model repository."),
    "serve": ("serve", "Serve engines with a real tritonserver, supervised."),
    "status": ("status", "Show what is served on this machine, and whether it answers."),
    "bench": ("bench", "Measure latency and throughput of a served engine."),
    "deploy": ("deploy", "Render the Kubernetes manifests of an engine, and commands of other runtimes."),
    "nim": ("nim", "Write the directory that NVIDIA NIM loads an engine from."),
    "report": ("report", "Write one page about an engine, or about several side by side."),
    "push": ("push", "Upload an engine to the Hugging Face hub, with model card and SBOM."),
    "explain": ("explain", "Explain an error or finding code, such as TC-316."),
}
"""Command -> (module in toolchain.cli, short help). The short help stands here so that --help imports no command."""

HELP = """From Hugging Face MoE weights to a quantized, verified, served and measured engine.

\b
The whole picture in one command (MODEL is a local directory or a hub id):
  toolchain engine Qwen/Qwen3-30B-A3B --format nvfp4 --gpu b200 --target trtllm
  toolchain serve engines/qwen--qwen3-30b-a3b-nvfp4-trtllm-b200

\b
Stage by stage, each reads and writes files only:
  toolchain plan MODEL --format fp8 --gpu h100 --target trtllm
  toolchain quantize MODEL --format fp8 --output CHECKPOINT --calib-data chats.jsonl
  toolchain verify CHECKPOINT --against MODEL
  toolchain evaluate CHECKPOINT --baseline MODEL --data held-out.jsonl
  toolchain build CHECKPOINT --target trtllm --gpu h100 --output engines/mine
  toolchain triton engines/mine

Data goes to stdout (--json on every command), progress to stderr. Exit status: 0 done, 1 failed, 2 wrong usage.
"""


class LazyGroup(click.Group):
    """A group whose commands live in modules that are imported on use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"toolchain.cli.{COMMANDS[cmd_name][0]}")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, help_line) for name, (_, help_line) in COMMANDS.items()])


@click.group(cls=LazyGroup, help=HELP, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="toolchain")
@click.option("--debug", is_flag=True, help="Show a traceback when something fails.")
@click.pass_context
def cli(ctx: click.Context, debug: bool) -> None:
    ctx.obj = {**(ctx.obj or {}), "debug": debug}


def main(arguments: list[str] | None = None) -> None:
    """Console entry point: turns errors into one clear message (or JSON) and an exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or {"-h", "--help", "--version"} & set(arguments):
        sys.exit(_run(arguments, sys.stdout))
    status = 0
    with stdout_for_data() as stream:
        status = _run(arguments, stream)
    sys.exit(status)


def _run(arguments: list[str], stream: IO[str]) -> int:
    """Exit status of one command, whose data go to ``stream``."""
    as_json, debug = "--json" in arguments, "--debug" in arguments
    try:
        status: Any = cli.main(
            args=arguments, prog_name="toolchain", standalone_mode=False, obj={"stdout": stream}
        )
    except ToolchainError as error:
        if debug:
            raise
        return _report(error, as_json, stream)
    except click.exceptions.Exit as error:
        return error.exit_code
    except click.ClickException as error:
        if as_json:
            return _report(_usage(error), as_json, stream)
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted: what was finished is kept, run the same command again to go on", err=True)
        return 130
    except Exception as error:
        if debug:
            raise
        return _report(_refused(error) or _unexpected(error), as_json, stream)
    return status if isinstance(status, int) else 0


def _usage(error: click.ClickException) -> ToolchainError:
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "toolchain"
    return UsageError(error.format_message(), hint=f"`{command} --help` lists what it takes", code="TC-001")


def _refused(error: Exception) -> ToolchainError | None:
    """What the operating system says about a path (read-only, no space, no permission) is no defect."""
    if not isinstance(error, OSError) or error.errno is None:
        return None
    where = f"{error.filename}: " if error.filename else ""
    return ToolchainError(
        f"{where}{error.strerror or error}",
        hint="check that the path exists, is writable and has space; or choose another one",
        code="TC-002",
    )


def _unexpected(error: Exception) -> ToolchainError:
    return ToolchainError(
        f"unexpected {type(error).__name__}: {error}",
        hint="this is a defect of the toolchain or of a library: run again with `toolchain --debug ...` and report it",
    )


def _report(error: ToolchainError, as_json: bool, stream: IO[str]) -> int:
    """Print ``error``, as JSON on the data stream or in words on stderr; returns the exit status."""
    import json

    if as_json:
        click.echo(json.dumps({"error": error.to_json()}, indent=2), file=stream)
        return error.exit_code
    click.secho(f"error {error.code}: {error.message}", fg="red", err=True)
    for finding in getattr(error, "findings", ()):
        click.echo(f"  {finding}", err=True)
    if error.hint:
        click.echo(f"hint: {error.hint}", err=True)
    return error.exit_code
