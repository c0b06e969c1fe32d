# SPDX-License-Identifier: Apache-2.0
"""The scripts that prepare nodes and split them, on a Slurm of several."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.slurm import Lab

pytestmark = pytest.mark.slurm

ROOT = Path(__file__).parents[2]
INSTALL = ROOT / "env" / "install_all_nodes.sh"
DEPLOY = ROOT / "env" / "smart_deploy.sh"
RUN = ROOT / "sbatch" / "smart_run.sh"

# Stands for rdma-kv: says what it was asked for.
SAYER = """\
#!/bin/bash
case $1 in
  config) printf 'model:\\n  name: tiny\\n  tensor_parallel_size: 2\\n' ;;
  adopt) echo /runs/$2 ;;
  *) echo "$@" ;;
esac
"""

HEADER = """\
#!/bin/bash
#SBATCH --time=5 --output=%j.out --nodes=1 --ntasks-per-node=3 --constraint=prefill --gres=gpu:4
#SBATCH hetjob
#SBATCH --time=5 --nodes=2 --ntasks-per-node=2 --constraint=decode --gres=gpu:4
"""


@pytest.fixture
def folder(lab: Lab, request: pytest.FixtureRequest) -> Path:
    """A folder that all nodes see."""
    path = lab.shared / re.sub(r"\W+", "-", request.node.name)
    path.mkdir()
    return path


@pytest.fixture
def clean_tmp(lab: Lab) -> Iterator[None]:
    """Nodes' /tmp without what a test puts there."""
    yield
    for node in lab.nodes:
        lab.check("bash", "-c", "rm -rf /tmp/staged /tmp/env*", node=node)


def wheel(folder: Path) -> Path:
    """A package with one module, which pip installs without a network."""
    path = folder / "tiny-1.0-py3-none-any.whl"
    files = {
        "tiny.py": "NAME = 'tiny'\n",
        "tiny-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n",
        "tiny-1.0.dist-info/WHEEL": (
            "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        ),
        "tiny-1.0.dist-info/entry_points.txt": "[console_scripts]\nrdma-kv = tiny:NAME.upper\n",
        "tiny-1.0.dist-info/RECORD": "",
    }
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return path


def run_in_job(lab: Lab, folder: Path, script: str) -> str:
    """Runs lines in the batch script of a job of p0 or p1, d0 and d1; returns all output."""
    file = folder / "job.sbatch"
    file.write_text(HEADER + script)
    job = lab.submit(file, cwd=folder)
    states = lab.wait_for(job, "COMPLETED", "FAILED", timeout_s=90)
    output = (folder / f"{job}.out").read_text()
    assert set(states.values()) == {"COMPLETED"}, output
    return output


# install_all_nodes.sh


def test_check_names_nodes_that_are_alike_together(lab: Lab) -> None:
    lab.check("mkdir", "-p", "/tmp/env/bin", node="d1")
    lab.check("ln", "-sf", sys.base_prefix + "/bin/python3", "/tmp/env/bin/python", node="d1")
    done = lab.run(INSTALL, "--check", "--env", "/tmp/env", "--", "-N", "4")

    assert done.returncode == 1, done.stderr
    alike, other = done.stdout.split("d1:\n")
    assert alike == "d0,p0,p1:\n  lacks the environment: nothing in /tmp/env\n"
    assert other.startswith("  lacks rdma-kv in")
    assert done.stderr == ""
    lab.check("rm", "-r", "/tmp/env", node="d1")


def test_check_of_a_whole_environment_is_good_on_all_nodes(lab: Lab) -> None:
    done = lab.run(INSTALL, "--check", "--env", sys.prefix, "--", "-N", "4")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("d0,d1,p0,p1:\n")
    assert "lacks" not in done.stdout


@pytest.mark.usefixtures("clean_tmp")
def test_each_node_gets_an_environment_of_its_own_once(lab: Lab, folder: Path) -> None:
    pip = f"--no-index {wheel(folder)}"
    command = [INSTALL, "--each-node", "--env", "/tmp/env", "--pip", pip, "--", "-w", "d0,d1"]
    first = lab.run(*command, timeout_s=110)
    assert first.returncode == 0, first.stdout + first.stderr
    assert first.stdout.startswith("d0,d1:\n")
    for node in ("d0", "d1"):
        assert lab.check("/tmp/env/bin/python", "-c", "import tiny", node=node) == ""
    assert lab.run("ls", "/tmp/env", node="p0").returncode == 2

    again = lab.check(*command)
    assert again == "d0,d1:\n  install: /tmp/env is up to date\n"


def test_failure_on_one_node_is_named_and_counts(lab: Lab, folder: Path) -> None:
    done = lab.run(
        *(INSTALL, "--each-node", "--env", "/proc/env", "--pip", f"--no-index {wheel(folder)}"),
        *("--", "-w", "d0,p0"),
    )
    assert done.returncode == 1
    assert done.stdout.startswith("d0,p0:\n")
    assert "/proc/env" in done.stdout


def test_missing_modules_are_said(lab: Lab, folder: Path) -> None:
    done = lab.run(INSTALL, "--env", folder / "env", "--module", "python/3.12")
    assert done.returncode == 1
    assert "no environment modules on ctl, but --module is given" in done.stderr
    assert not (folder / "env").exists()


def test_two_installations_of_one_environment_take_turns(lab: Lab, folder: Path) -> None:
    command = [INSTALL, "--env", folder / "env", "--pip", f"--no-index {wheel(folder)}"]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with (
        lab.popen(*command, node="p0", **options) as one,
        lab.popen(*command, node="d0", **options) as other,
    ):
        said = [process.communicate(timeout=90)[0] for process in (one, other)]
    assert [one.returncode, other.returncode] == [0, 0], said
    assert sum("pip install" in text for text in said) == 1, said
    assert sum("is up to date" in text for text in said) == 1, said


# smart_deploy.sh


@pytest.fixture
def model(folder: Path) -> Path:
    path = folder / "model of mine"
    (path / "sub").mkdir(parents=True)
    (path / "config.json").write_text("{}")
    (path / "sub" / "weights.safetensors").write_bytes(os.urandom(3_000_000))
    # As in the Hugging Face cache.
    (path / "linked.json").symlink_to(path / "config.json")
    return path


def staged_at(output: str, variable: str) -> str:
    match = re.search(rf"^{variable}=(.*)$", output, re.MULTILINE)
    assert match is not None, output
    return match[1].replace("\\ ", " ")


@pytest.mark.usefixtures("clean_tmp")
def test_model_is_staged_to_all_components_once(lab: Lab, folder: Path, model: Path) -> None:
    deploy = f"{DEPLOY} --to /tmp/staged --model '{model}'"
    output = run_in_job(lab, folder, f"{deploy}\n{deploy}\necho job of $SLURM_JOB_NODELIST\n")
    target = staged_at(output, "RDMA_KV_MODEL")
    assert target.startswith("/tmp/staged/model of mine-")
    assert output.count("MiB in") == 1, output
    assert f"deploy: {target} is there" in output
    weights = hashlib.sha256((model / "sub" / "weights.safetensors").read_bytes()).hexdigest()
    prefill = "p0" if "job of p0" in output else "p1"
    for node in (prefill, "d0", "d1"):
        found = lab.check("sha256sum", f"{target}/sub/weights.safetensors", node=node)
        assert found.split()[0] == weights
        assert lab.check("cat", f"{target}/linked.json", node=node) == "{}"
        assert "partial" not in lab.check("ls", "-A", "/tmp/staged", node=node)


def test_full_disk_is_said_before_anything_is_copied(lab: Lab, folder: Path, model: Path) -> None:
    lab.check("mkdir", "/tmp/small", node="d1")
    lab.check("mount", "-t", "tmpfs", "-o", "size=1m", "small", "/tmp/small", node="d1")
    deploy = f"{DEPLOY} --to /tmp/small --model '{model}' || echo code $?"
    output = run_in_job(lab, folder, f"{deploy}\n")

    assert "d1:\n  /tmp/small has 1 MiB free, 2 MiB are needed\n" in output
    assert "deploy: error: /tmp/small cannot be used\ncode 1\n" in output
    assert "RDMA_KV_MODEL" not in output
    lab.check("umount", "/tmp/small", node="d1")


@pytest.mark.usefixtures("clean_tmp")
def test_verify_repairs_and_remove_leaves_what_is_not_ours(
    lab: Lab, folder: Path, model: Path
) -> None:
    deploy = f"{DEPLOY} --to /tmp/staged --model '{model}'"
    spoil = (
        "srun --het-group=1 -N1 -n1 -w d1 bash -c 'echo spoilt > /tmp/staged/model*/config.json'"
    )
    show = "srun --het-group=1 -N1 -n1 -w d1 bash -c 'cat /tmp/staged/model*/config.json'"
    keep = "srun --het-group=1 -N1 -n1 -w d1 touch /tmp/staged/keep"
    output = run_in_job(
        lab,
        folder,
        f"{deploy}\n{spoil}\n{deploy}\necho; echo was $({show})\n"
        f"{deploy} --verify\necho is $({show})\n{keep}\n{DEPLOY} --to /tmp/staged --remove\n",
    )
    assert "was spoilt" in output
    assert "is {}" in output
    assert output.count("MiB in") == 2, output
    assert output.count("removed /tmp/staged/model of mine-") == 1, output
    assert lab.check("ls", "-A", "/tmp/staged", node="d1") == "keep\n"


@pytest.mark.usefixtures("clean_tmp")
def test_staged_environment_runs_from_its_new_place(lab: Lab, folder: Path) -> None:
    env = folder / "env"
    lab.check(INSTALL, "--env", env, "--pip", f"--no-index {wheel(folder)}", timeout_s=90)
    output = run_in_job(
        lab,
        folder,
        f'eval "$({DEPLOY} --to /tmp/staged --env {env})"\n'
        "echo RDMA_KV=$RDMA_KV\n"
        "head -1 $RDMA_KV\n"
        "srun --het-group=1 -N2 -n2 ${RDMA_KV%/*}/python -c "
        "'import sys, tiny; print(sys.prefix, tiny.__file__)'\n"
        f"{DEPLOY} --to /tmp/staged --env {env} --verify\n",
    )
    program = staged_at(output, "RDMA_KV")
    target = program.removesuffix("/bin/rdma-kv")
    assert re.fullmatch(r"/tmp/staged/env-[0-9a-f]{12}", target)
    assert f"#!{target}/bin/python" in output
    assert len(re.findall(rf"^{target} {target}/lib/.*/tiny.py$", output, re.MULTILINE)) == 2
    assert f"deploy: {target} is there" in output


def test_without_a_job_it_stages_here(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    env = {key: text for key, text in os.environ.items() if not key.startswith("SLURM")}
    command = [DEPLOY, "--to", tmp_path / "local", "--model", model]
    done = subprocess.run(
        command, env={**env, "HOME": str(tmp_path)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert Path(staged_at(done.stdout, "RDMA_KV_MODEL"), "config.json").read_text() == "{}"
    bad = subprocess.run([DEPLOY, "--to", "here"], capture_output=True, text=True, check=False)
    assert bad.returncode == 2
    assert "absolute" in bad.stderr


# smart_run.sh


@pytest.fixture
def sayer(folder: Path) -> Path:
    path = folder / "rdma-kv"
    path.write_text(SAYER)
    path.chmod(0o755)
    (folder / "job.yaml").touch()
    return path


def smart_run(lab: Lab, sayer: Path, *arguments: str, sbatch: tuple[str, ...]) -> tuple[str, int]:
    """Runs it as a batch script; returns its output and exit code."""
    env = {"RDMA_KV": str(sayer)}
    folder = sayer.parent
    job = lab.submit(*sbatch, "--output=%j.out", RUN, *arguments, cwd=folder, env=env)
    states = lab.wait_for(job, "COMPLETED", "FAILED")
    shown = lab.check("scontrol", "show", "job", str(job))
    match = re.search(r"ExitCode=(\d+):", shown)
    assert match is not None, (states, shown)
    return (folder / f"{job}.out").read_text(), int(match[1])


def engines(prefill: int, decode: int) -> str:
    return f"--set prefill.engines={prefill} --set decode.engines={decode}"


def test_nodes_are_split_as_asked(lab: Lab, sayer: Path) -> None:
    config = sayer.parent / "job.yaml"
    output, code = smart_run(lab, sayer, "1", "2", "job.yaml", sbatch=("-N3", "--gres=gpu:4"))
    assert code == 0, output
    assert output.splitlines()[-1] == (
        f"serve --config {config} --run-dir /runs/serve --set slurm.one_component=true "
        "--set slurm.nodes=3 --set prefill.nodes=1 --set decode.nodes=2 " + engines(2, 4)
    )


def test_prompts_are_answered_over_half_and_half(lab: Lab, sayer: Path) -> None:
    arguments = ("job.yaml", "in.jsonl", "out.jsonl", "--concurrency", "4")
    output, code = smart_run(lab, sayer, *arguments, sbatch=("-N4",))
    assert code == 0, output
    last = output.splitlines()[-1]
    assert last.startswith("batch in.jsonl -o out.jsonl --config ")
    assert "--set prefill.nodes=2 --set decode.nodes=2 " + engines(2, 2) in last
    assert last.endswith(" --concurrency 4")


def test_one_node_runs_both(lab: Lab, sayer: Path) -> None:
    output, code = smart_run(lab, sayer, "job.yaml", sbatch=("-N1", "--gres=gpu:4"))
    assert code == 0, output
    assert engines(1, 1) in output


def test_components_are_the_split(lab: Lab, sayer: Path) -> None:
    folder = sayer.parent
    (folder / "het.sbatch").write_text(
        HEADER + f"{RUN} job.yaml\n{RUN} 2 1 job.yaml || echo code $?\n"
    )
    job = lab.submit("het.sbatch", cwd=folder, env={"RDMA_KV": str(sayer)})
    lab.wait_for(job, "COMPLETED")
    output = (folder / f"{job}.out").read_text()
    assert "--set prefill.nodes=1 --set decode.nodes=2 " + engines(2, 4) in output
    assert "slurm.one_component" not in output
    assert "components have 1 and 2 nodes, not 2 and 1" in output
    assert "code 2" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("1", "1", "job.yaml"), "1 + 1 nodes are asked for, the job has 3"),
        (("3", "0", "job.yaml"), "each role needs a node"),
        (("none.yaml",), "there is no job file none.yaml"),
        (("--bad", "job.yaml"), "unknown option --bad"),
    ],
)
def test_what_does_not_fit_is_said(
    lab: Lab, sayer: Path, arguments: tuple[str, ...], message: str
) -> None:
    output, code = smart_run(lab, sayer, *arguments, sbatch=("-N3",))
    assert code == 2
    assert message in output


def test_local_needs_no_slurm(tmp_path: Path) -> None:
    sayer = tmp_path / "rdma-kv"
    sayer.write_text(SAYER)
    sayer.chmod(0o755)
    config = tmp_path / "job.yaml"
    config.touch()
    env = {"PATH": "/usr/bin:/bin", "RDMA_KV": str(sayer), "SLURM_JOB_ID": "7"}
    command = [RUN, "--local", "1", "2", config]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.stdout == f"serve --config {config} {engines(1, 2)}\n", done.stderr

    env.pop("SLURM_JOB_ID")
    done = subprocess.run([RUN, config], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "not in a job of Slurm" in done.stderr
