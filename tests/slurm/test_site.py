# SPDX-License-Identifier: Apache-2.0
"""The site file: its section `site:`, and `rdma-kv init`, which writes it."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from rdma_kv_cache.cli import main
from rdma_kv_cache.config import JobError, load_job
from rdma_kv_cache.slurm.site import Site, load_site

JOB = "model: {name: org/model}\n"


@pytest.fixture
def site_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the site file is looked for; there is none yet. No Slurm on PATH."""
    path = tmp_path / "etc" / "site.yaml"
    path.parent.mkdir()
    monkeypatch.setenv("RDMA_KV_SITE", str(path))
    monkeypatch.setenv("PATH", str(tmp_path))
    return path


def init(*arguments: str, answers: str = "") -> Result:
    return CliRunner().invoke(main, ["init", *arguments], input=answers)


def test_without_a_site_file(tmp_path: Path) -> None:
    assert load_site({"HOME": str(tmp_path)}) == Site()


def test_the_site_section_is_not_the_jobs(site_file: Path, tmp_path: Path) -> None:
    site_file.write_text("slurm: {account: a}\nsite: {rejects: [gres], runs: $ROOT/runs}\n")
    env = {"RDMA_KV_SITE": str(site_file)}
    job_file = tmp_path / "job.yaml"
    job_file.write_text(JOB)
    assert load_job(job_file, env).slurm.account == "a"
    assert load_site(env).rejects == ("gres",)


def test_the_runs_folder_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/u")
    monkeypatch.setenv("SCRATCH", "/scratch/u")
    assert Site().runs_path == Path("/home/u/rdma-kv-runs")
    assert Site(runs="$SCRATCH/runs").runs_path == Path("/scratch/u/runs")
    assert Site(runs="runs").runs_path == Path.cwd() / "runs"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "site: {reject: [gres]}",
            "site.reject = ['gres']: unknown key. Did you mean site.rejects?",
        ),
        ("site: {rejects: [account]}", "site.rejects = 'account': should be 'gres'"),
        ("site: {container: apptainer}", "site: container is apptainer, so image must be given"),
        ("site: 3", "site = 3: "),
    ],
)
def test_what_is_wrong_is_named(site_file: Path, text: str, words: str) -> None:
    site_file.write_text(text)
    with pytest.raises(JobError) as caught:
        load_site({"RDMA_KV_SITE": str(site_file)})
    assert str(caught.value).startswith(f"{site_file}: {words}")


def test_a_job_file_has_no_site_section(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(JOB + "site: {rejects: [gres]}\n")
    with pytest.raises(JobError, match="site: unknown key"):
        load_job(path, {})


def test_init_asks_and_writes(site_file: Path) -> None:
    answers = ["abc", "gpu", "", "8:00:00", "cuda/12 gcc", "a=1; export a", "", "pmix", "gres"]
    result = init(answers="\n".join([*answers, "", "", "", "", "", ""]) + "\n")
    assert result.exit_code == 0, result.output
    assert "no sinfo on PATH" in result.output
    assert site_file.read_text().splitlines()[1:] == [
        *("slurm:", "  account: abc", "  partition: gpu", "  time: '8:00:00'", "  modules:"),
        *("  - cuda/12", "  - gcc", "  setup:", "  - a=1", "  - export a", "  mpi: pmix"),
        *("site:", "  rejects:", "  - gres"),
    ]
    assert load_site({"RDMA_KV_SITE": str(site_file)}).rejects == ("gres",)


def test_init_without_questions(site_file: Path) -> None:
    arguments = ("--yes", "--set", "slurm.qos=high", "--set", "site.rejects=[gres, exclusive]")
    assert "qos: high" in init(*arguments, "--dry-run").output
    assert not site_file.exists()
    assert init(*arguments).exit_code == 0
    assert load_site({"RDMA_KV_SITE": str(site_file)}).rejects == ("gres", "exclusive")
    again = init(*arguments)
    assert again.exit_code == 2
    assert "replace it with --force" in again.output
    assert init("--yes", "--force").exit_code == 0
    assert "qos" not in site_file.read_text()


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("slurm.accont=a", "slurm.accont = 'a': unknown key. Did you mean slurm.account?"),
        ("site.rejects=[nodes]", "site.rejects = 'nodes'"),
        ("account", "is not section.key=value"),
    ],
)
def test_init_writes_nothing_wrong(site_file: Path, setting: str, words: str) -> None:
    result = init("--yes", "--set", setting)
    assert result.exit_code == 2
    assert words in result.output
    assert not site_file.exists()


def test_the_table_of_keys_has_the_sites(site_file: Path) -> None:
    output = CliRunner().invoke(main, ["config", "--keys"]).output
    assert "site.rejects" in output
    assert "slurm.qos" in output
