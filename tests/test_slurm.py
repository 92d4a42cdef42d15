"""docs/slurm.md: its scripts are taken from the page and run as far as that goes without Slurm."""

from __future__ import annotations

import itertools
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import click
import pytest

from tests.planning import plan_for
from tests.sweeps import make_root, write_spec
from toolchain.cli.main import cli
from toolchain.plan.policy import PolicyOptions

PAGE = (Path(__file__).parent.parent / "docs" / "slurm.md").read_text(encoding="utf-8")
BLOCKS = {kind: re.findall(rf"```{kind}\n(.*?)```", PAGE, re.DOTALL) for kind in ("bash", "python", "yaml")}
BIN = Path(sys.executable).parent
VARIABLE = re.compile(r"\$\{?\w+\}?")


def commands() -> list[str]:
    """Every call of the toolchain, in scripts and in the text."""
    scripts = "\n".join(BLOCKS["bash"]).replace("\\\n", " ")
    found = [
        line.strip() for script in re.split(r"\n|&&|\|| -- ", scripts) for line in [script]
        if line.strip().startswith("toolchain ")
    ]  # fmt: skip
    return [*found, *re.findall(r"`(toolchain [^`]+)`", PAGE)]


def test_there_are_commands() -> None:
    assert len(commands()) >= 6 and len(BLOCKS["bash"]) >= 6


@pytest.mark.parametrize("line", commands())
def test_every_command_line_is_accepted(line: str) -> None:
    words = shlex.split(VARIABLE.sub("host:1", line.removesuffix("&").replace("\n", " ")))
    found = cli.get_command(click.Context(cli), words[1])
    assert found is not None, words[1]
    context = found.make_context(words[1], words[2:])
    assert context.params


@pytest.mark.parametrize("script", BLOCKS["bash"])
def test_scripts_are_bash(script: str) -> None:
    checked = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
    assert checked.returncode == 0 and checked.stderr == ""


def stand_in(directory: Path, name: str, script: str) -> None:
    path = directory / name
    path.write_text(f"#!/bin/bash\n{script}\n")
    path.chmod(0o755)


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """The environment of job 2 of an array; its programs say what they were asked, in files."""
    programs = tmp_path / "bin"
    programs.mkdir()
    stand_in(programs, "scontrol", f"echo $* > {tmp_path}/scontrol")
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "names.txt").write_text("first\nsecond\nthird\n")
    return {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "SLURM_ARRAY_JOB_ID": "70",
        "SLURM_ARRAY_TASK_ID": "2",
        "SLURM_JOB_ID": "72",
        "SLURM_CPUS_PER_TASK": "1",
    }


def array_script() -> str:
    found = [block for block in BLOCKS["bash"] if "again()" in block]
    assert len(found) == 1
    return found[0].replace("source /shared/toolchain/.venv/bin/activate", "true")


@pytest.mark.parametrize("status", [0, 1, 2])
def test_a_job_runs_its_cell_and_has_its_status(cluster: dict[str, str], tmp_path: Path, status: int) -> None:
    stand_in(tmp_path / "bin", "toolchain", f"echo $* > {tmp_path}/asked; exit {status}")
    ran = subprocess.run(["bash", "-c", array_script()], cwd=tmp_path, env=cluster)
    assert ran.returncode == status and not (tmp_path / "scontrol").exists()
    assert (tmp_path / "asked").read_text() == "sweep qwen.yaml --output sweeps/qwen --only second\n"


def test_a_job_whose_time_is_up_ends_its_cell_and_goes_back_into_the_queue(
    cluster: dict[str, str], tmp_path: Path
) -> None:
    cell = f"trap 'touch {tmp_path}/ended; exit 143' TERM; touch {tmp_path}/begun; sleep 60 & wait"
    stand_in(tmp_path / "bin", "toolchain", cell)
    job = subprocess.Popen(["bash", "-c", array_script()], cwd=tmp_path, env=cluster)
    started = time.monotonic()
    while not (tmp_path / "begun").exists():
        assert job.poll() is None and time.monotonic() - started < 30
        time.sleep(0.02)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=30) == 0
    assert (tmp_path / "ended").exists() and (tmp_path / "scontrol").read_text() == "requeue 70_2\n"


def test_names_are_written_down(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """The commands of the page, as they stand there."""
    make_root(tiny("qwen3_moe"), tmp_path)
    write_spec(tmp_path, "qwen", formats=["w4a16_nvfp4"])
    script = next(block for block in BLOCKS["bash"] if "names.txt" in block and "again()" not in block)
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"}
    ran = subprocess.run(
        ["bash", "-ec", script], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    names = (tmp_path / "jobs" / "names.txt").read_text()
    assert names == "small-w4a16_nvfp4-max\nsmall-w4a16_nvfp4-mse\n" and ran.stdout.endswith("2\n")


def test_submitit_runs_a_sweep(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """With its local executor, which it takes where there is no Slurm."""
    pytest.importorskip("submitit")
    make_root(tiny("qwen3_moe"), tmp_path)
    write_spec(tmp_path, "qwen", formats=["w4a16_nvfp4"], recipes=["max"])
    (script,) = BLOCKS["python"]
    (tmp_path / "submit.py").write_text(script)
    command = [sys.executable, "submit.py", "qwen.yaml", "--until", "quantize"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "1 finished" in ran.stdout
    engine = tmp_path / "sweeps" / "qwen" / "engines" / "small-w4a16_nvfp4-max"
    assert list((engine / "checkpoint").glob("*.safetensors"))


def test_the_huge_model_needs_no_data(tiny: Callable[[str], Path]) -> None:
    """What its command asks for can be shared out shard by shard."""
    from toolchain.quantize.quantizers import needs_data

    (line,) = [line for line in commands() if "--ray-address" in line and "quantize" in line]
    words = shlex.split(VARIABLE.sub("host:1", line))
    asked = dict(itertools.pairwise(words))
    assert asked["quantize"] == "deepseek-ai/DeepSeek-V3" and "--stream" in words
    options = {
        "recipe": asked["--recipe"],
        "policy_options": PolicyOptions(shared_experts=asked["--shared-experts"]),
    }
    assert not needs_data(plan_for(tiny("deepseek_v3"), asked["--format"], **options))


def test_the_sweep_of_the_page_can_be_read(tmp_path: Path) -> None:
    from toolchain.pipeline.sweep.cells import cells_of
    from toolchain.pipeline.sweep.spec import read_sweep

    (spec,) = BLOCKS["yaml"]
    (tmp_path / "qwen.yaml").write_text(spec)
    cells = cells_of(read_sweep(tmp_path / "qwen.yaml"))
    assert len(cells) == 8 and [cell.name for cell in cells if cell.error] == []
