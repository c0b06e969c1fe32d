# SPDX-License-Identifier: Apache-2.0
"""`rdma-kv init`: asks what a site needs, once, and writes the site file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from rdma_kv_cache.cli import common

if TYPE_CHECKING:
    from collections.abc import Iterable

Section = Literal["slurm", "site"]
Question = tuple[Section, str, str]

# Empty answers leave the key out: the default holds, or each job file says it.
QUESTIONS: tuple[Question, ...] = (
    ("slurm", "account", "Account to charge (--account)"),
    ("slurm", "partition", "Partition"),
    ("slurm", "qos", "QoS"),
    ("slurm", "time", "Time limit of a job, e.g. 4:00:00"),
    ("slurm", "modules", "Environment modules, in order (separated by blanks)"),
    ("slurm", "setup", "Shell lines before the ranks start (separated by ;)"),
    ("slurm", "launcher", "What starts the ranks: srun or mpiexec"),
    ("slurm", "mpi", "srun --mpi (MPICH speaks pmi2)"),
    ("site", "rejects", "sbatch options refused here: gres gpus-per-node exclusive segment"),
    ("site", "runs", "Folder for run folders, seen by all nodes"),
    ("site", "model_cache", "Folder for models (HF_HOME), seen by all nodes"),
    ("site", "scratch", "Node-local folder for staging"),
    ("site", "mail", "Mail address for the end of jobs"),
    ("site", "container", "Container: none, apptainer or pyxis"),
    ("site", "image", "Image of the container"),
)
_SEPARATORS = {"modules": None, "rejects": None, "setup": ";"}


@click.command("init", short_help="Ask what this site needs, and write the site file.")
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="SECTION.KEY=VALUE",
    help="An answer given beforehand, e.g. slurm.account=abc. Repeatable.",
)
@click.option("--yes", is_flag=True, help="Ask nothing: only what --set says is written.")
@click.option("--force", is_flag=True, help="Replace a site file that exists.")
@click.option("--dry-run", is_flag=True, help="Print the file; write nothing.")
def init_site(settings: tuple[str, ...], yes: bool, force: bool, dry_run: bool) -> None:
    """Write the site file: $RDMA_KV_SITE, else ~/.config/rdma-kv/site.yaml.

    Its sections hold for every job, unless the job file, the environment or --set says otherwise;
    `site:` says what holds for the site alone. All keys: rdma-kv config --keys.

    Exit code: 0 if it is written, 1 if it cannot be or nobody answers, 2 for bad input.

    \b
    Example:
      rdma-kv init
      rdma-kv init --yes --set slurm.account=abc --set site.rejects=[gres]
    """
    path = _target()
    if path.exists() and not (force or dry_run):
        raise common.InputError(f"{path} exists; replace it with --force, or edit it")
    content = _given(settings)
    if not yes:
        _show_what_slurm_says()
        _ask(content)
    text = _checked_text(content)
    if dry_run:
        click.echo(text, nl=False)
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise click.ClickException(f"cannot write {path}: {error.strerror}") from error
    click.echo(f"Wrote {path}")


def _target() -> Path:
    from rdma_kv_cache.config.load import site_file, usual_site_file

    path = site_file(os.environ) or usual_site_file(os.environ)
    if path is None:
        raise common.InputError("neither $RDMA_KV_SITE nor $HOME is set: where shall it go?")
    return path


def _given(settings: Iterable[str]) -> dict[str, dict[str, Any]]:
    from rdma_kv_cache.config import JobError
    from rdma_kv_cache.config.load import parse_override

    content: dict[str, dict[str, Any]] = {}
    try:
        for setting in settings:
            (section, *rest), value = parse_override(setting)
            content.setdefault(section, {})[".".join(rest)] = value
    except JobError as error:
        raise common.InputError(str(error)) from error
    return content


def _ask(content: dict[str, dict[str, Any]]) -> None:
    common.say("Press Enter for none, or for the default; Ctrl-C writes nothing.")
    for section, key, question in QUESTIONS:
        if key in content.get(section, {}):
            continue
        if key == "image" and content.get("site", {}).get("container", "none") == "none":
            continue
        answer = click.prompt(question, default="", show_default=False, err=True).strip()
        if not answer:
            continue
        value: str | list[str] = answer
        if key in _SEPARATORS:
            parts = answer.split(_SEPARATORS[key])
            value = [part.strip() for part in parts if part.strip()]
        content.setdefault(section, {})[key] = value


def _show_what_slurm_says() -> None:
    """Say which partitions and PMIs there are; without Slurm say that."""
    from rdma_kv_cache.slurm import programs

    try:
        partitions = programs.run(["sinfo", "--noheader", "--format=%P|%D|%l|%G"])
    except programs.SlurmError as error:
        common.say(f"Slurm could not be asked ({error}); the answers are taken as they are.")
        return
    common.say("Partitions (the default has a *): nodes, time limit, GPUs")
    for line in sorted(set(partitions.splitlines())):
        common.say("  " + "  ".join(line.split("|")))


def _checked_text(content: dict[str, dict[str, Any]]) -> str:
    """Return the site file. What would be refused when a job reads it becomes an InputError."""
    import tempfile

    import yaml

    from rdma_kv_cache.config import JobError
    from rdma_kv_cache.config.load import check_site_file
    from rdma_kv_cache.slurm.site import load_site

    text = "# What holds for every job here. Keys: rdma-kv config --keys\n"
    text += yaml.safe_dump(content, sort_keys=False) if content else ""
    with tempfile.TemporaryDirectory() as folder:
        trial = Path(folder) / "site.yaml"
        trial.write_text(text, encoding="utf-8")
        try:
            check_site_file(trial)
            load_site({"RDMA_KV_SITE": str(trial)})
        except JobError as error:
            raise common.InputError(str(error).replace(f"{trial}: ", "")) from error
    return text
