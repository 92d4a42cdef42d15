"""Scripts that run beside a server: the check of versions, and a node of TensorRT-LLM over MPI, with stand-ins for
ssh, sshd and mpirun. None of them has met TensorRT-LLM."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.deployments import write_engine

TEMPLATES = Path(__file__).resolve().parent.parent / "toolchain" / "deploy" / "templates"


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """Site-packages in which TensorRT-LLM 1.2.1 is installed, by its metadata."""
    info = tmp_path / "site" / "tensorrt_llm-1.2.1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tensorrt_llm\nVersion: 1.2.1\n")
    return info.parent


def check(
    engine: Path, packages: Path | None, *command: str, **more: str
) -> subprocess.CompletedProcess[str]:
    paths = {"PYTHONPATH": str(packages)} if packages else {}
    environment = {"PATH": os.environ["PATH"], "ENGINE": str(engine), **paths, **more}
    words = [sys.executable, str(TEMPLATES / "check_versions.py"), *command]
    return subprocess.run(words, capture_output=True, text=True, timeout=60, env=environment)


def test_the_locked_release_is_served(tmp_path: Path, packages: Path) -> None:
    ran = check(write_engine(tmp_path / "e"), packages, "echo", "serving", "it")
    assert (ran.returncode, ran.stdout) == (0, "serving it\n")


def test_another_release_is_refused_before_anything_starts(tmp_path: Path, packages: Path) -> None:
    engine = write_engine(tmp_path / "e", version="1.1.0")
    ran = check(engine, packages, "echo", "serving")
    assert ran.returncode == 1 and ran.stdout == ""
    assert "made for TensorRT-LLM 1.1.0, this image has 1.2.1" in ran.stderr
    assert check(engine, packages, "echo", "serving", ANY_VERSION="1").returncode == 0


def test_other_directories_and_other_images_are_refused(tmp_path: Path, packages: Path) -> None:
    local = write_engine(tmp_path / "local", target="local", gpu="cpu")
    assert "versions.lock.json is missing" in check(local, packages, "true").stderr
    assert "no TensorRT-LLM" in check(write_engine(tmp_path / "e"), None, "true").stderr
    assert check(tmp_path / "e", packages).returncode == 2


@pytest.fixture
def node(tmp_path: Path) -> dict[str, str]:
    """The environment of a pod; its programs say what they were asked for."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, script in {
        "mpirun": f'printf "%s\\n" "$@" > {tmp_path}/mpirun',
        "sshd": f'printf "%s\\n" "$@" > {tmp_path}/sshd',
        # Each worker answers at the second try.
        "ssh": f'host=${{@: -2:1}}; echo "$@" >> {tmp_path}/ssh; test -e {tmp_path}/$host && exit 0\n'
        f"touch {tmp_path}/$host; exit 255",
    }.items():
        (programs / name).write_text(f"#!/bin/bash\n{script}\n")
        (programs / name).chmod(0o755)
    keys = tmp_path / "keys"
    keys.mkdir()
    (keys / "id_ed25519").write_text("PRIVATE\n")
    (keys / "id_ed25519.pub").write_text("ssh-ed25519 AAAA me@here\n")
    script = (TEMPLATES / "mpi_node.sh").read_text().replace("/ssh/", f"{keys}/")
    (tmp_path / "node.sh").write_text(script)
    return {
        "PATH": f"{programs}:/usr/bin:/bin",
        "LWS_LEADER_ADDRESS": "big-0.big.models",
        "LWS_GROUP_SIZE": "3",
        "LWS_WORKER_INDEX": "0",
        "WAIT_S": "0",
        "NCCL_DEBUG": "INFO",
        "TMPDIR": str(tmp_path),
    }


def run_node(root: Path, node: dict[str, str], *words: str) -> None:
    subprocess.run(["bash", root / "node.sh", *words], env=node, check=True, timeout=60, capture_output=True)


def test_the_leader_waits_for_its_workers_and_starts_all_ranks(tmp_path: Path, node: dict[str, str]) -> None:
    run_node(tmp_path, node, "8", "trtllm-serve", "/engine/checkpoint", "--port", "8000")
    words = (tmp_path / "mpirun").read_text().splitlines()
    assert words[words.index("-n") + 1] == "24"
    assert words[words.index("--host") + 1] == "big-0.big.models:8,big-0-1.big.models:8,big-0-2.big.models:8"
    assert words[-5:] == ["trtllm-llmapi-launch", "trtllm-serve", "/engine/checkpoint", "--port", "8000"]
    assert {words[index + 1] for index, word in enumerate(words) if word == "-x"} == {"PATH", "NCCL_DEBUG"}
    asked = (tmp_path / "ssh").read_text().splitlines()
    assert len(asked) == 4 and all("StrictHostKeyChecking=yes" in line for line in asked)
    options = words[words.index("plm_rsh_args") + 1].split()
    known = Path(options[options.index("-o") + 1].split("=")[1])
    assert "big" not in known.read_text() and "ssh-ed25519 AAAA" in known.read_text()
    key = Path(options[options.index("-i") + 1])
    assert key.read_text() == "PRIVATE\n" and key.stat().st_mode & 0o077 == 0


def test_a_worker_waits_for_the_leader(tmp_path: Path, node: dict[str, str]) -> None:
    run_node(tmp_path, {**node, "LWS_WORKER_INDEX": "2"}, "8")
    words = (tmp_path / "sshd").read_text()
    assert "PasswordAuthentication=no" in words and "2222" in words
    assert not (tmp_path / "mpirun").exists()


@pytest.mark.parametrize("ranks", [1, 2])
def test_one_tritonserver_for_each_rank(ranks: int, tmp_path: Path) -> None:
    """As ``launch_triton_server.py`` does: rank 0 loads the repository, the others the model that runs ranks."""
    for name in ("mpirun", "tritonserver"):
        (tmp_path / name).write_text('#!/bin/sh\necho "$(basename "$0")" "$@"\n')
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    script = TEMPLATES / "triton_ranks.sh"
    ran = subprocess.run(
        ["bash", script, str(ranks)], env=environment, capture_output=True, text=True, timeout=60
    )
    program, *words = ran.stdout.split()
    assert program == ("tritonserver" if ranks == 1 else "mpirun")
    parts = " ".join(words).split(" : ")
    assert len(parts) == ranks and all("--model-repository=/repository" in part for part in parts)
    assert len({part.split("shm-region-prefix-name=")[1].split()[0] for part in parts}) == ranks
    assert ["--load-model=tensorrt_llm" in part for part in parts] == [rank > 0 for rank in range(ranks)]
