# SPDX-License-Identifier: Apache-2.0
"""The command line: help, exit codes, one clear message for each mistake."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from rdma_kv_cache import __version__
from rdma_kv_cache.cli import common, main
from rdma_kv_cache.cli.batch import why_gone
from rdma_kv_cache.cli.doctor import check_devices, check_mpi, check_vllm
from rdma_kv_cache.cluster.run_dir import RunDir, RunState
from rdma_kv_cache.config import load_job

if TYPE_CHECKING:
    from click.testing import Result

EXAMPLE = Path(__file__).parents[2] / "jobs" / "configs" / "llama-3.1-8b-2p2d-a100.yaml"


def rdma_kv(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def test_help_and_version() -> None:
    output = rdma_kv("--help").output
    assert all(command in output for command in ("serve", "batch", "doctor", "config"))
    assert "\n  rank " not in output
    assert __version__ in rdma_kv("--version").output


@pytest.mark.parametrize("command", ["serve", "batch", "doctor", "config", "rank"])
def test_each_help_has_an_example(command: str) -> None:
    result = rdma_kv(command, "--help")
    assert result.exit_code == 0
    assert f"rdma-kv {command}" in result.output.partition("Example:")[2]


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys\n"
        "from rdma_kv_cache.cli import main\n"
        "main(['batch', '--help'], standalone_mode=False)\n"
        "heavy = {'torch', 'vllm', 'mpi4py', 'aiohttp', 'pydantic', 'rich'} & set(sys.modules)\n"
        "sys.exit(str(sorted(heavy)) if heavy else 0)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], check=False, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


def test_module_can_be_run() -> None:
    command = [sys.executable, "-m", "rdma_kv_cache.cli", "batch"]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    assert result.returncode == 2
    assert "Usage: rdma-kv batch" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["serve"], "Missing option '--config'"),
        (["serve", "--config", "/no/job.yaml"], "/no/job.yaml: cannot read the job file"),
        (["config"], "Give a JOB_FILE to check, or --keys"),
        (["config", "/no/job.yaml"], "cannot read the job file"),
        (["config", str(EXAMPLE), "--set", "rdma.queue=1"], "Did you mean rdma.queue_depth?"),
        (["batch", "p.jsonl", "-o", "out"], "Give either --config (start engines) or --url"),
        (["batch", "p", "-o", "o", "--url", "u", "--config", "c"], "Give either --config"),
        (["batch", "/no/p.jsonl", "-o", "out", "--url", "u"], "cannot read prompts"),
        (["batch", "p", "-o", "o", "--url", "u", "--concurrency", "0"], "'--concurrency'"),
        (["batch", __file__, "-o", "o", "--url", "u", "--api-key-file", "/no/key"], "/no/key"),
        (["batch", __file__, "-o", "/proc/x/o", "--url", "u"], "/proc/x: cannot make the folder"),
        (["batch", __file__, "-o", "/tmp", "--url", "u"], "is a folder"),
        (["bogus"], "No such command 'bogus'"),
    ],
)
def test_a_mistake_is_one_clear_message(arguments: list[str], words: str) -> None:
    result = rdma_kv(*arguments)
    assert result.exit_code == 2
    assert words in result.output
    assert "Traceback" not in result.output


def test_a_bad_job_file_is_told_before_engines_start(tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text("model: {name: ./nowhere}\nrdma: {queue_dept: 1}\n")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"custom_id": "a"}\n')
    for arguments in (["serve"], ["batch", str(prompts), "-o", str(tmp_path / "out")]):
        result = rdma_kv(*arguments, "--config", str(job), "--run-dir", str(tmp_path / "run"))
        assert result.exit_code == 2
        assert "rdma.queue_dept = 1: unknown key" in result.output
        assert "there is no model folder" in result.output
        assert not (tmp_path / "run").exists()


def test_the_ranks_read_the_job_after_overrides(tmp_path: Path) -> None:
    job = common.load(EXAMPLE, ["rdma.queue_depth=7", "orchestrator.api_key=very-secret"])
    folder = RunDir(tmp_path / "run")
    copy = common.write_job(folder, job)
    assert load_job(copy, env={}) == job
    assert stat.S_IMODE(copy.stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700
    with pytest.raises(common.InputError, match="cannot write the run folder /proc/x"):
        common.write_job(RunDir("/proc/x"), job)


def test_a_batch_learns_that_its_engines_are_gone(tmp_path: Path) -> None:
    folder = RunDir(tmp_path)
    folder.create()
    assert why_gone(folder) == ""
    folder.write_state(RunState("READY", pid=os.getpid()))
    assert why_gone(folder) == ""
    folder.write_state(RunState("FAILED", "serving", "no decode engine is left", pid=os.getpid()))
    assert why_gone(folder) == "the run has ended: no decode engine is left"
    ended = subprocess.Popen(["true"])
    ended.wait()
    folder.write_state(RunState("READY", pid=ended.pid))
    assert f"the orchestrator (pid {ended.pid}) has died" in why_gone(folder)


def test_config_prints_the_job_with_overrides() -> None:
    result = rdma_kv("config", str(EXAMPLE), "--set", "rdma.queue_depth=256")
    assert result.exit_code == 0
    assert "queue_depth: 256" in result.output
    assert "max_restarts: 3" in result.output


def test_config_hides_the_key() -> None:
    result = rdma_kv("config", str(EXAMPLE), "--set", "orchestrator.api_key=very-secret")
    assert result.exit_code == 0
    assert "very-secret" not in result.output


def test_config_keys_are_not_cut() -> None:
    output = rdma_kv("config", "--keys").output
    assert "rdma.load_failure_policy" in output
    assert "recompute | fail" in output
    assert "…" not in output


def test_doctor_tells_everything() -> None:
    result = rdma_kv("doctor", "--json")
    report = json.loads(result.stdout)
    names = {check["name"] for check in report["checks"]}
    assert {"python", "vllm", "mpi launcher", "memlock limit"} <= names
    assert result.exit_code == (0 if report["usable"] else 1)
    plain = rdma_kv("doctor")
    assert all(name in plain.output for name in names)
    assert plain.exit_code == result.exit_code


def test_doctor_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rdma_kv_cache._native", None)
    monkeypatch.delattr("rdma_kv_cache._native", raising=False)
    result = rdma_kv("doctor")
    assert result.exit_code == 1
    assert "no  native extension" in result.output
    assert "build it" in result.output
    assert "No backend is usable here" in result.output


def test_doctor_finds_devices(tmp_path: Path) -> None:
    port = tmp_path / "mlx5_0" / "ports" / "1"
    port.mkdir(parents=True)
    (port / "state").write_text("4: ACTIVE\n")
    (port / "link_layer").write_text("InfiniBand\n")
    (port / "rate").write_text("200 Gb/sec (4X HDR)\n")
    down = tmp_path / "mlx5_1" / "ports" / "1"
    down.mkdir(parents=True)
    (down / "state").write_text("1: DOWN\n")
    first, second = check_devices(tmp_path)
    assert first.ok
    assert first.name == "mlx5_0 port 1"
    assert first.detail == "4: ACTIVE, InfiniBand, 200 Gb/sec (4X HDR)"
    assert second.ok is False
    assert "rate unreadable (No such file or directory)" in second.detail
    (nothing,) = check_devices(tmp_path / "none")
    assert nothing.ok is None


def test_doctor_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.metadata.packages_distributions", dict)
    assert "pip install vllm" in check_vllm().detail
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert check_mpi().ok is False
    assert "pip install mpich" in check_mpi().detail
