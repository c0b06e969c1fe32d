# SPDX-License-Identifier: Apache-2.0
"""`rdma-kv render`, `submit` and `adopt`, with an sbatch that keeps what it is given."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from rdma_kv_cache.cli import main
from rdma_kv_cache.slurm import records

REPOSITORY = Path(__file__).parents[2]
PROMPT = '{"custom_id": "1", "method": "POST", "url": "/v1/completions", "body": {"prompt": "a"}}\n'
# What it says is what sbatch says, by its options; $SAID is what a site's filter adds.
SBATCH = """#!/bin/bash
[ -z "$FAIL" ] || { echo "sbatch: error: Batch job submission failed: $FAIL" >&2; exit 1; }
cp "${@: -1}" "$KEPT/script"
env >"$KEPT/env"
[ "$1" = --parsable ] && { printf '%s' "$SAID"; echo "41;cluster"; exit; }
echo "Submitted batch job 41"
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder: a job file, prompts, and no Slurm. Nothing of this user's own counts."""
    (tmp_path / "job.yaml").write_text("model: {name: org/model}\ndecode: {engines: 2}\n")
    (tmp_path / "prompts.jsonl").write_text(PROMPT)
    (tmp_path / "bin").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for program in ("cp", "env", "bash", "realpath", "sed"):
        (tmp_path / "bin" / program).symlink_to(shutil.which(program) or "")
    monkeypatch.setenv("PATH", f"{tmp_path}/bin")
    for name in [*os.environ]:
        if name.startswith(("SLURM", "MODEL_", "RDMA_KV_")):
            monkeypatch.delenv(name)
    return tmp_path


@pytest.fixture
def sbatch(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder with what was submitted: `script` and `env`."""
    for name in ("sbatch", "srun"):
        (place / "bin" / name).write_text(SBATCH)
        (place / "bin" / name).chmod(0o755)
    kept = place / "kept"
    kept.mkdir()
    monkeypatch.setenv("KEPT", str(kept))
    return kept


def rdma_kv(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def serve(*arguments: str, command: str = "submit") -> Result:
    own = ["--no-model-check"] if command == "submit" else []
    return rdma_kv(command, "serve", "--config", "job.yaml", *own, *arguments)


def test_a_model_that_the_nodes_would_not_find(sbatch: Path) -> None:
    result = serve("--model-check", "--sbatch")
    assert result.exit_code == 2
    assert "org/model: it is not in the cache" in result.output
    assert "rdma-kv fetch org/model" in result.output
    assert not (sbatch / "script").exists()


def test_render_is_what_is_submitted(sbatch: Path) -> None:
    rendered = serve("--sbatch", "--set", "slurm.qos=high", command="render")
    submitted = serve("--sbatch", "--set", "slurm.qos=high")
    assert submitted.exit_code == 0, submitted.output
    assert (sbatch / "script").read_text() == rendered.output
    assert "#SBATCH --qos=high" in rendered.output
    assert rendered.output.endswith(' \\\n  --config "$run/job.yaml" --run-dir "$run"\n')


def test_the_record(sbatch: Path, place: Path) -> None:
    result = serve("--sbatch", "--json", "--name", "my job")
    record = json.loads(result.output)
    folder = place / "rdma-kv-runs" / "my-job-41"
    assert record["job_id"] == 41
    assert (record["kind"], record["via"], record["predecessor"]) == ("serve", "sbatch", None)
    assert record["job_file"] == str(place / "job.yaml")
    read = records.read(folder)
    assert read is not None
    assert read.folder == str(folder) == record["folder"]
    assert records.read_all(place / "rdma-kv-runs") == [read]
    assert (folder / "script.sh").read_text() == (sbatch / "script").read_text()
    assert folder.stat().st_mode & 0o777 == 0o700
    # Nothing else is left in the runs folder.
    assert [entry.name for entry in folder.parent.iterdir()] == ["my-job-41"]


def test_a_record_that_cannot_be_read_hides_no_other(place: Path) -> None:
    for name, text in (("a-1", "{"), ("b-2", "{}"), ("c-3", "")):
        (place / "runs" / name).mkdir(parents=True)
        (place / "runs" / name / "submission.json").write_text(text)
    (place / "runs" / "d-4").mkdir()
    assert records.read_all(place / "runs") == []
    assert records.read_all(place / "nowhere") == []


def test_from_inside_a_job_nothing_of_it_goes_on(
    sbatch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_NODELIST_HET_GROUP_1", "d0")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    assert serve("--sbatch").exit_code == 0
    names = {line.partition("=")[0] for line in (sbatch / "env").read_text().splitlines()}
    assert {name for name in names if name.startswith("SLURM")} == {"SLURM_CONF"}


def test_what_a_sites_filter_says_is_no_job_id(
    sbatch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAID", "You have 7 hours left\n")
    assert "Submitted job 41" in serve("--sbatch").output


def test_a_refusal(sbatch: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAIL", "Invalid account")
    result = serve("--sbatch")
    assert result.exit_code == 1
    assert "Batch job submission failed: Invalid account" in result.output
    assert list((place / "rdma-kv-runs").iterdir()) == []


def test_without_slurm(place: Path) -> None:
    result = serve("--sbatch")
    assert result.exit_code == 1
    assert f"no sbatch on PATH ({place}/bin" in result.output
    assert "rdma-kv render" in result.output
    assert serve("--sbatch", "--dry-run").output.startswith("#!/bin/bash\n")
    assert not (place / "rdma-kv-runs").exists()


def test_batch(place: Path) -> None:
    result = rdma_kv(
        *("render", "batch", "prompts.jsonl", "-o", "out/answers.jsonl", "--config", "job.yaml"),
        *("--sbatch", "--runs", "here", "--option=--dependency=afterok:3", "--concurrency", "64"),
    )
    assert result.exit_code == 0, result.output
    files = f"{place}/prompts.jsonl -o {place}/out/answers.jsonl"
    assert f"batch {files} --concurrency 64 \\\n" in result.output
    assert f"folder={place}/here/job-$SLURM_JOB_ID" in result.output
    assert result.output.count("--dependency=afterok:3") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--nonsense"], "No such option"),
        (["--set", "rdma.x=1"], "unknown key"),
        (["--set", "prefill.nodes=2"], "prefill.nodes = 2: are more nodes"),
        (["--option", "-n3"], "say --option=--NAME=VALUE"),
    ],
)
def test_bad_input_is_told_before_it_queues(sbatch: Path, arguments: list[str], words: str) -> None:
    result = serve("--sbatch", *arguments)
    assert result.exit_code == 2
    assert words in result.output
    assert not (sbatch / "script").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["no.jsonl"], "no.jsonl"),
        (["prompts.jsonl", "--concurrency", "0"], "--concurrency"),
    ],
)
def test_bad_batches_are_told_before_they_queue(
    sbatch: Path, arguments: list[str], words: str
) -> None:
    given = ["-o", "out.jsonl", "--config", "job.yaml", "--sbatch"]
    result = rdma_kv("submit", "batch", *arguments, *given)
    assert result.exit_code == 2
    assert words in result.output
    assert not (sbatch / "script").exists()


@pytest.mark.parametrize("command", [["submit"], ["submit", "serve"], ["submit", "batch"],
    ["render"], ["render", "serve"], ["render", "batch"], ["init"], ["adopt"]])  # fmt: skip
def test_each_help_has_an_example(command: list[str]) -> None:
    output = rdma_kv(*command, "--help").output
    assert f"rdma-kv {' '.join(command)}" in output.partition("Example:")[2]


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys\n"
        "from rdma_kv_cache.cli import main\n"
        "main(['submit', 'serve', '--help'], standalone_mode=False)\n"
        "heavy = {'submitit', 'aiohttp', 'pydantic', 'rich', 'msgspec'} & set(sys.modules)\n"
        "sys.exit(str(sorted(heavy)) if heavy else 0)\n"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def adopt(place: Path, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rdma_kv_cache.cli", "adopt", "serve", "job.yaml"]
    with (place / "rdma-kv-serve-9.out").open("a") as output:
        return subprocess.run(
            command,
            env={**os.environ, "SLURM_JOB_NODELIST": "p0", **env},
            stdout=subprocess.PIPE,
            stderr=output,
            check=False,
            text=True,
        )


def test_adopt(place: Path) -> None:
    done = adopt(place, SLURM_JOB_ID="9", SLURM_JOB_NAME="my serve")
    folder = place / "rdma-kv-runs" / "my-serve-9"
    assert done.stdout == f"{folder}/attempt-0\n"
    assert (folder / "latest").resolve() == folder / "attempt-0"
    record = records.read(folder)
    assert record is not None
    assert (record.job_id, record.name, record.kind) == (9, "my-serve", "serve")
    assert folder.with_name("my-serve-9.out").resolve() == place / "rdma-kv-serve-9.out"
    again = adopt(place, SLURM_JOB_ID="9", SLURM_JOB_NAME="my serve", SLURM_RESTART_COUNT="1")
    assert again.stdout == f"{folder}/attempt-1\n"
    assert records.read(folder) == record


def test_adopt_outside_of_a_job(place: Path) -> None:
    assert adopt(place).returncode == 2
    assert "this is for batch scripts" in (place / "rdma-kv-serve-9.out").read_text()


@pytest.mark.parametrize(
    ("script", "arguments", "words"),
    [
        (
            "serve",
            ["job.yaml", "--set", "a=b"],
            "serve --config {place}/job.yaml --run-dir RUN --set a=b",
        ),
        (
            "batch",
            ["job.yaml", "in.jsonl", "out.jsonl"],
            "batch in.jsonl -o out.jsonl --config {place}/job.yaml --run-dir RUN",
        ),
    ],
)
def test_the_scripts_for_sbatch(place: Path, script: str, arguments: list[str], words: str) -> None:
    program = place / "bin" / "rdma-kv"
    program.write_text('#!/bin/sh\n[ "$1" = adopt ] && echo RUN || echo "$@"\n')
    program.chmod(0o755)
    command = ["bash", str(REPOSITORY / "sbatch" / f"{script}.sbatch")]
    env = {**os.environ, "SLURM_JOB_ID": "9", "SLURM_SUBMIT_DIR": str(place)}
    done = subprocess.run(
        [*command, *arguments], env=env, check=True, capture_output=True, text=True
    )
    assert done.stdout.strip() == words.format(place=place)
    outside = subprocess.run(command, check=False, capture_output=True, text=True)
    assert outside.returncode == 2
    assert outside.stderr.startswith(f"{script}.sbatch CONFIG")
