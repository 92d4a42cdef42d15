"""toolchain push"""

from __future__ import annotations

from pathlib import Path

import click

from toolchain.cli.options import ENGINE, dry_run_option, force_option, json_option
from toolchain.cli.output import Terminal, emit, facts, size, table


@click.command(name="push")
@click.argument("engine", type=ENGINE)
@click.argument("repo_id", metavar="OWNER/NAME")
@click.option("--private", is_flag=True, help="Make a new repository private.")
@click.option(
    "--revision", metavar="BRANCH", help="Branch to commit to, made where it is missing. Default: main."
)
@click.option("--message", help="Message of the commit.")
@click.option(
    "--base-model",
    metavar="OWNER/NAME",
    help="The source model on the hub. Default: what the engine was made of.",
)
@click.option(
    "--license",
    "license_id",
    metavar="ID",
    help="Its licence, such as apache-2.0. Default: what its card says.",
)
@dry_run_option
@force_option
@json_option
@click.pass_context
def command(
    ctx: click.Context,
    engine: Path,
    repo_id: str,
    private: bool,
    revision: str | None,
    message: str | None,
    base_model: str | None,
    license_id: str | None,
    dry_run: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Upload ENGINE's checkpoint to the Hugging Face hub, with a model card of its measured numbers and an SBOM.

    Refuses engines that failed a gate or their audit and files that changed since; --force publishes them, and the card
    says why not to use them. The token is that of `hf auth login` or HF_TOKEN. --dry-run lists every file and shows the
    card, without the network.
    """
    from toolchain.publish.hub import upload
    from toolchain.publish.publication import prepare

    terminal = Terminal()
    publication = prepare(engine, repo_id, base_model=base_model, license_id=license_id, progress=terminal)
    for finding in publication.findings:
        if force or dry_run or finding.severity == "warning":  # a refusal lists its reasons itself
            terminal.note(str(finding))
    document = publication.to_json()
    if dry_run:
        rows = [(item.path, size(item.size_bytes)) for item in publication.items]
        listed = table(("file", "size"), [*rows, ("all", size(publication.size_bytes))])
        emit(document, as_json, f"{listed}\n\n{publication.card}")
        if not force and any(finding.severity == "error" for finding in publication.findings):
            ctx.exit(1)
        return
    publication.require_allowed(force=force)
    done = upload(publication, private=private, revision=revision, message=message, progress=terminal)
    rows = [("repository", done.url), ("commit", done.commit), ("files", str(len(publication.items)))]
    rows += [("removed", ", ".join(done.deleted))] if done.deleted else []
    emit(
        {**document, "url": done.url, "commit": done.commit, "deleted": list(done.deleted)},
        as_json,
        facts(rows),
    )
