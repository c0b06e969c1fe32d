# SPDX-License-Identifier: Apache-2.0
"""The batch script of a job. It depends on its arguments alone, and holds the whole job file."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rdma_kv_cache.config import JobError, Problem, dump_job
from rdma_kv_cache.slurm.plan import plan
from rdma_kv_cache.slurm.site import Site

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from rdma_kv_cache.config import JobConfig
    from rdma_kv_cache.slurm.plan import ComponentPlan
    from rdma_kv_cache.slurm.records import Kind

MAX_NAME_CHARS = 64
RUN = '"$run"'
"""The run folder, in a command of the script."""
RUN_VARIABLE = "RDMA_KV_RUN"
"""Tells a function that submitit runs the run folder, whose name holds the job id."""

_END_OF_JOB = "END_OF_JOB"
_PLAIN = re.compile(r"[\w@%+=:,./-]+", re.ASCII)
# The job in the script is after all overrides: what set-up lines or modules export has no say.
_JOB_VARIABLES = "MODEL_NAME MODEL_MAX_LEN GPU_MEMORY_UTILIZATION TENSOR_PARALLEL_SIZE"


@dataclass(frozen=True)
class Submission:
    """A job to be submitted."""

    kind: Kind
    name: str
    """See `job_name`."""
    job: JobConfig
    runs: Path
    """The runs folder, absolute."""
    program: tuple[str, ...]
    """`rdma-kv`, as the first node finds it."""
    arguments: tuple[str, ...] = ()
    """Of the command, beside --config and --run-dir."""
    site: Site = field(default_factory=Site)
    sbatch_options: tuple[str, ...] = ()
    """For this submission, e.g. --dependency=…"""
    command: str | None = None
    """A line of shell in place of the program's; `RUN` is the run folder."""


def job_name(text: str) -> str:
    """Return `text` as a name of a job and of its folder: letters, digits, dots and dashes."""
    return re.sub(r"[^\w.-]+", "-", text, flags=re.ASCII).strip(".-")[:MAX_NAME_CHARS] or "job"


def render(submission: Submission) -> str:
    """Return the batch script. Raises JobError for a job that cannot be submitted."""
    job = submission.job
    if job.orchestrator.api_key not in ("auto", "none"):
        raise JobError(
            [
                Problem(
                    "this job",
                    "orchestrator.api_key",
                    "would stand in the script, which Slurm keeps and operators can read",
                    "Leave it at auto: the key is then in api.key of the run folder, for you alone",
                )
            ]
        )
    components = plan(job)
    sections = [
        _header(submission, components),
        _run_folder(submission),
        _environment(job, submission.site),
        f"exec {submission.command or _command(submission)}\n",
    ]
    return "\n".join(section for section in sections if section)


def _header(submission: Submission, components: Sequence[ComponentPlan]) -> str:
    slurm, site = submission.job.slurm, submission.site
    # Modules are shell functions that a login shell defines.
    shebang = "#!/bin/bash -l" if slurm.modules else "#!/bin/bash"
    lines = [shebang, f"# rdma-kv {submission.kind}: {_in_words(submission.job, components)}"]
    output = str(submission.runs).replace("%", "%%") + "/%x-%j.out"
    first = [
        ("job-name", submission.name),
        ("output", output),
        ("open-mode", "append"),
        # Slurm's requeue of heterogeneous jobs differs by version; we submit anew instead.
        ("no-requeue", None),
    ]
    if site.mail:
        first += [("mail-user", site.mail), ("mail-type", site.mail_type)]
    for index, component in enumerate(components):
        if index:
            lines.append("#SBATCH hetjob")
        directives = [*(first if index == 0 else []), *_directives(submission, component)]
        lines += [_directive(name, value) for name, value in directives]
        options = (*slurm.options, *(submission.sbatch_options if index == 0 else ()))
        lines += [_directive(*_split(option)) for option in options]
    return "\n".join(lines) + "\n"


def _directives(
    submission: Submission, component: ComponentPlan
) -> Iterable[tuple[str, str | None]]:
    slurm, rejects = submission.job.slurm, submission.site.rejects
    signal = f"B:USR1@{slurm.signal_s}" if slurm.signal_s else None
    wanted: list[tuple[str, str | int | None]] = [
        ("account", slurm.account),
        ("partition", slurm.partition),
        ("qos", slurm.qos),
        ("time", slurm.time),
        ("signal", signal),
        ("nodes", component.nodes),
        ("ntasks-per-node", component.tasks_per_node),
        ("cpus-per-task", slurm.cpus_per_task),
        ("mem", slurm.mem),
        ("constraint", component.constraint),
        _gpus(component, submission.site),
        ("segment", slurm.segment),
    ]
    for name, value in wanted:
        if value is not None and name not in rejects:
            yield name, str(value)
    if slurm.exclusive and "exclusive" not in rejects:
        yield "exclusive", None


def _gpus(component: ComponentPlan, site: Site) -> tuple[str, str | None]:
    """Return the option that asks for the GPUs of a node, and its value."""
    gres = component.gres
    if gres is None or "gres" not in site.rejects:
        return "gres", gres
    gpus = [entry.strip().removeprefix("gres/") for entry in gres.split(",")]
    if not all(entry == "gpu" or entry.startswith("gpu:") for entry in gpus):
        raise JobError(
            [
                Problem(
                    "this job",
                    f"{'prefill' if component.role == 'any' else component.role}.gres",
                    "has more than GPUs, but this site refuses --gres (site.rejects)",
                    "Leave only gpu:… in it, and say the rest in slurm.options",
                    gres,
                )
            ]
        )
    counts = [entry.removeprefix("gpu").removeprefix(":") or "1" for entry in gpus]
    return "gpus-per-node", ",".join(counts)


def _run_folder(submission: Submission) -> str:
    folder = shlex.quote(f"{submission.runs}/{submission.name}") + "-$SLURM_JOB_ID"
    return f"""set -e
folder={folder}
run=$folder/attempt-${{SLURM_RESTART_COUNT:-0}}
(
  umask 077
  mkdir -p "$run"
  cat >"$run/job.yaml" <<'{_END_OF_JOB}'
{dump_job(submission.job)}{_END_OF_JOB}
)
ln -sfn "${{run##*/}}" "$folder/latest"
"""


def _environment(job: JobConfig, site: Site) -> str:
    lines = [f"module load {shlex.quote(module)}" for module in job.slurm.modules]
    lines += job.slurm.setup
    if site.model_cache:
        lines.append(f"export HF_HOME={_path(site.model_cache)}")
    if site.offline:
        lines.append("export HF_HUB_OFFLINE=1")
    if job.slurm.cpus_per_task:
        # From 22.05 on srun does not take it over from sbatch.
        lines.append(f"export SRUN_CPUS_PER_TASK={job.slurm.cpus_per_task}")
    lines.append(f"unset {_JOB_VARIABLES}")
    return "\n".join(lines) + "\n"


def _command(submission: Submission) -> str:
    words = [*submission.program, submission.kind, *submission.arguments]
    return f'{shlex.join(words)} \\\n  --config "$run/job.yaml" --run-dir {RUN}'


def _path(path: str) -> str:
    """Quote a path, but leave its $VARIABLES to the node's shell."""
    path = re.sub(r"^~(?=/|$)", "$HOME", path)
    return '"' + re.sub(r'(["\\`])', r"\\\1", path) + '"'


def _in_words(job: JobConfig, components: Sequence[ComponentPlan]) -> str:
    if len(components) == 1:
        prefill, decode = job.prefill.engines, job.decode.engines
        return f"{prefill} prefill and {decode} decode engine(s) on {components[0].nodes} node(s)"
    return "; ".join(
        f"{job.group(role).engines} {role} engine(s) on {job.group(role).nodes} node(s)"
        for role in ("prefill", "decode")
    )


def _split(option: str) -> tuple[str, str | None]:
    name, equals, value = option.removeprefix("--").partition("=")
    return name, value if equals else None


def _directive(name: str, value: str | None) -> str:
    """Return one #SBATCH line. Raises JobError for what would end it early."""
    if value is None:
        return f"#SBATCH --{name}"
    if not value.isprintable():
        raise JobError(
            [Problem("this job", f"--{name}", "holds a control character", "Remove it", value)]
        )
    return f"#SBATCH --{name}={value if _PLAIN.fullmatch(value) else shlex.quote(value)}"
