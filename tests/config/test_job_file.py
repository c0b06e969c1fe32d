# SPDX-License-Identifier: Apache-2.0
"""The job file: what is accepted, which layer wins, and what each mistake is told."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from pydantic import ValidationError

from rdma_kv_cache.config import JobConfig, JobError, dump_job, key_rows, load_job

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    Load = Callable[..., JobConfig]

CONFIGS = Path(__file__).parents[2] / "jobs" / "configs"
MODEL = "model: {name: org/model}\n"


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Load a job file with the given text, in an environment of its own."""

    def load(
        text: str, env: Mapping[str, str] | None = None, sets: Sequence[str] = ()
    ) -> JobConfig:
        path = tmp_path / "job.yaml"
        path.write_text(text, encoding="utf-8")
        return load_job(path, env or {}, sets)

    return load


def problems(load: Load, text: str, **layers: object) -> list[str]:
    """What is told about a wrong job, a line each."""
    with pytest.raises(JobError) as caught:
        load(text, **layers)
    lines = str(caught.value).splitlines()
    assert len(lines) == len(caught.value.problems)
    return lines


def problem(load: Load, text: str, **layers: object) -> str:
    """The one thing that is told about a wrong job."""
    (line,) = problems(load, text, **layers)
    return line


def test_defaults(load: Load) -> None:
    job = load(MODEL)
    assert job.model.name == "org/model"
    assert job.rdma.block_size == 1 << 20
    assert job.rdma.load_failure_policy == "recompute"
    assert job.orchestrator.host == "auto"
    assert job.world_size == 3


def test_engine_names(load: Load) -> None:
    job = load(MODEL + "prefill: {engines: 2}\ndecode: {engines: 3}\n")
    assert job.engine_names("prefill") == ["prefill-0", "prefill-1"]
    assert job.engine_names("decode") == ["decode-0", "decode-1", "decode-2"]
    assert job.world_size == 6


def test_a_job_cannot_be_changed(load: Load) -> None:
    job = load(MODEL + "prefill: {vllm_args: [--enforce-eager]}\n")
    with pytest.raises(ValidationError):
        job.model.name = "other"  # type: ignore[misc]
    assert job.prefill.vllm_args == ("--enforce-eager",)


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("2GiB", 2 << 30), ("256MiB", 256 << 20), ("1.5 GiB", 3 << 29), ("2GB", 2 * 10**9),
     ("1048576", 1 << 20)],
)  # fmt: skip
def test_byte_sizes(load: Load, text: str, nbytes: int) -> None:
    assert load(f"{MODEL}rdma: {{kv_buffer: {text}}}\n").rdma.kv_buffer == nbytes


def test_numbers_are_text_where_text_is_due(load: Load) -> None:
    job = load(MODEL + "decode: {env: {THREADS: 0}, vllm_args: [--max-num-seqs, 8]}\n")
    assert job.decode.env == {"THREADS": "0"}
    assert job.decode.vllm_args == ("--max-num-seqs", "8")


def test_a_time_is_not_a_number(load: Load) -> None:
    assert load(MODEL + "slurm: {time: 4:00:00}\n").slurm.time == "4:00:00"


def test_precedence(load: Load, tmp_path: Path) -> None:
    site = tmp_path / "site.yaml"
    site.write_text("model: {max_model_len: 100, tensor_parallel_size: 2}\n"
                    "rdma: {queue_depth: 1, qps_per_peer: 1}\nprefill: {env: {A: a, B: b}}\n")  # fmt: skip
    env = {"RDMA_KV_SITE": str(site), "MODEL_MAX_LEN": "300"}
    text = (
        "model: {name: org/model, max_model_len: 200}\n"
        "rdma: {queue_depth: 2}\nprefill: {env: {B: c}}\ndecode:\n"
    )
    job = load(text, env, ["rdma.queue_depth=4", "model.max_model_len=400"])
    assert job.model.max_model_len == 400
    assert load(text, env).model.max_model_len == 300
    assert load(text, {"RDMA_KV_SITE": str(site)}).model.max_model_len == 200
    assert (job.rdma.queue_depth, job.rdma.qps_per_peer) == (4, 1)
    assert job.model.tensor_parallel_size == 2
    assert job.prefill.env == {"A": "a", "B": "c"}


def test_the_usual_site_file_is_read(load: Load, tmp_path: Path) -> None:
    folder = tmp_path / ".config" / "rdma-kv"
    folder.mkdir(parents=True)
    (folder / "site.yaml").write_text("slurm: {account: phys}\n")
    assert load(MODEL, {"HOME": str(tmp_path)}).slurm.account == "phys"


def test_environment(load: Load) -> None:
    env = {"MODEL_NAME": "a/b", "MODEL_MAX_LEN": "512", "GPU_MEMORY_UTILIZATION": "0.5",
           "TENSOR_PARALLEL_SIZE": "4"}  # fmt: skip
    model = load("{}", env).model
    assert (model.name, model.max_model_len) == ("a/b", 512)
    assert (model.gpu_memory_utilization, model.tensor_parallel_size) == (0.5, 4)


def test_dump_is_read_back(load: Load) -> None:
    job = load(MODEL, {}, ["prefill.env.X=1", "slurm.time=4:00:00", "rdma.devices=[mlx5_0]"])
    assert load(dump_job(job)) == job


@pytest.mark.parametrize(
    ("text", "key", "words"),
    [
        ("rdma: {queue_dept: 5}", "rdma.queue_dept = 5", "Did you mean rdma.queue_depth?"),
        ("rdma: {zzz: 5}", "rdma.zzz = 5", "Valid keys of rdma: backend, devices, gid_index"),
        ("rdma: {max_model_len: 5}", "rdma.max_model_len", "Did you mean model.max_model_len?"),
        ("decod: {}", "decod", "Did you mean decode? Valid sections: model, prefill"),
        ("rdma: {queue_depth: many}", "rdma.queue_depth = 'many'", "a valid integer"),
        ("rdma: {queue_depth: 0}", "rdma.queue_depth = 0", "Expected integer 1..65536 (Writes"),
        ("rdma: {queue_depth: true}", "rdma.queue_depth = True", "a valid integer"),
        ("rdma: {queue_depth: null}", "rdma.queue_depth = None", "a valid integer"),
        ("rdma: {lease_s: .inf}", "rdma.lease_s = inf", "finite number"),
        ("rdma: {block_size: 1Mi}", "rdma.block_size = '1Mi'", "byte unit"),
        ("rdma: {kv_buffer: -2GiB}", "rdma.kv_buffer = '-2GiB'", "byte"),
        ("rdma: {backend: smoke}", "rdma.backend = 'smoke'", "'verbs'"),
        ("rdma: {devices: 4}", "rdma.devices = 4", "'auto', or should be a list"),
        ("rdma: 5", "rdma = 5", "Keys of rdma: backend"),
        ("prefill: {env: {A: true}}", "prefill.env.A = True", "a valid string"),
        ("prefill: {vllm_args: --x}", "prefill.vllm_args = '--x'", "should be a list"),
        ("orchestrator: {port: 99999}", "orchestrator.port = 99999", "less than or equal to 65535"),
        ("orchestrator: {health_timeout_s: 1}", "orchestrator", "at least twice heartbeat_s"),
        ("orchestrator: {api_key: a b}", "orchestrator.api_key: ", "pattern"),
        ("slurm: {time: soon}", "slurm.time = 'soon'", "d-h:mm:ss"),
    ],
)
def test_each_mistake_names_file_key_value_and_remedy(
    load: Load, tmp_path: Path, text: str, key: str, words: str
) -> None:
    line = problem(load, MODEL + text)
    assert line.startswith(f"{tmp_path / 'job.yaml'}: {key}")
    assert words in line


def test_all_mistakes_are_told_at_once(load: Load) -> None:
    text = "model: {name: ./nowhere, max_model_len: x}\nrdma: {a: 1}\nslurm: {time: soon}\n"
    keys = [line.split(": ")[1].split(" ")[0] for line in problems(load, text)]
    assert sorted(keys) == ["model.max_model_len", "model.name", "rdma.a", "slurm.time"]


def test_a_bad_variable_is_named(load: Load) -> None:
    line = problem(load, MODEL, env={"TENSOR_PARALLEL_SIZE": "two"})
    assert line.startswith("environment variable TENSOR_PARALLEL_SIZE: ")
    assert "model.tensor_parallel_size = 'two'" in line


def test_a_bad_site_file_is_named(load: Load, tmp_path: Path) -> None:
    site = tmp_path / "site.yaml"
    site.write_text("rdma: {queue: 1}\n")
    line = problem(load, MODEL, env={"RDMA_KV_SITE": str(site)})
    assert line.startswith(f"{site}: rdma.queue = 1: unknown key")
    missing = problem(load, MODEL, env={"RDMA_KV_SITE": str(tmp_path / "no.yaml")})
    assert "cannot read the site file: No such file" in missing


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("rdma.queue_depth=-1", "--set: rdma.queue_depth = -1: should be greater"),
        ("rdma.queue=1", "--set: rdma.queue = 1: unknown key"),
        ("queue_depth=1", "is not section.key=value"),
        ("rdma.queue_depth", "is not section.key=value"),
        ("rdma.=1", "is not section.key=value"),
    ],
)
def test_a_bad_override_is_named(load: Load, override: str, words: str) -> None:
    assert words in problem(load, MODEL, sets=[override])


def test_the_model_is_required(load: Load) -> None:
    assert "model: required, and not given" in problem(load, "rdma: {queue_depth: 1}")
    assert "model.name: required, and not given" in problem(load, "model: {max_model_len: 100}")


@pytest.mark.parametrize("name", ["./nowhere", "../nowhere", "/nowhere", "~/nowhere", "a/b/c"])
def test_a_missing_model_folder(load: Load, name: str) -> None:
    line = problem(load, f"model: {{name: {name}}}")
    assert f"model.name = {name!r}: there is no model folder /" in line
    assert "Download the model" in line


def test_a_model_folder_is_found_beside_the_job_file(load: Load, tmp_path: Path) -> None:
    folder = tmp_path / "models" / "tiny"
    folder.mkdir(parents=True)
    line = problem(load, "model: {name: ./models/tiny}")
    assert "holds no config.json" in line
    (folder / "config.json").write_text("{}")
    for name in ("./models/tiny", "models/tiny", str(folder)):
        assert load(f"model: {{name: {name}}}").model.name == str(folder)


def test_a_model_of_the_environment_is_found_in_the_current_folder(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "here" / "tiny"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    monkeypatch.chdir(folder.parent)
    assert load(MODEL, {"MODEL_NAME": "./tiny"}).model.name == str(folder)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\na: 2\n", "line 2: key 'a' is given twice"),
        ("rdma:\n  queue_depth: 1\n  queue_depth: 2\n", "line 3: key 'queue_depth' is given twice"),
        ("rdma: {a: [}\n", "not valid YAML: line 1"),
        ("rdma:\n\tqueue_depth: 1\n", "not valid YAML: line 2"),
        ("- 1\n", "a job file is a mapping of sections, this is a list"),
        ("!!python/object/apply:os.system [true]\n", "not valid YAML"),
        ("? [a, b]\n: 1\n", "not valid YAML"),
    ],
)
def test_a_file_that_is_no_job(load: Load, text: str, words: str) -> None:
    assert words in problem(load, text)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"no\.yaml: cannot read the job file: No such file"):
        load_job(tmp_path / "no.yaml", {})
    with pytest.raises(JobError, match="cannot read the job file: Is a directory"):
        load_job(tmp_path, {})
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(JobError, match="not UTF-8 text"):
        load_job(binary, {})


def test_every_key_is_described() -> None:
    rows = key_rows()
    assert {row.key.split(".")[0] for row in rows} == set(JobConfig.model_fields)
    assert all(row.type and row.default and row.description for row in rows)
    assert next(row for row in rows if row.key == "orchestrator.port").type == (
        "auto | integer 1..65535"
    )


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_job_files_of_the_repository_are_valid(path: Path) -> None:
    job = load_job(path, {"MODEL_NAME": "org/model"})
    shape = f"-{job.prefill.engines}p{job.decode.engines}d-"
    assert shape in path.stem
