# SPDX-License-Identifier: Apache-2.0
"""The job file's sections. Every key is described here, and only here."""

from __future__ import annotations

from collections.abc import Mapping  # noqa: TC003 (pydantic reads it at run time)
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    TypeAdapter,
    model_validator,
)

Role = Literal["prefill", "decode"]

_BYTE_SIZE = TypeAdapter(ByteSize)


def _parse_bytes(value: Any) -> Any:
    return int(_BYTE_SIZE.validate_python(value)) if isinstance(value, str) else value


def _whole_number_as_text(value: Any) -> Any:
    return str(value) if type(value) is int else value


Bytes = Annotated[
    int, BeforeValidator(_parse_bytes), Field(json_schema_extra={"format": "byte size (e.g. 2MiB)"})
]
# `- 8` and `THREADS: 0` are what people write for an argument or a variable.
Text = Annotated[str, BeforeValidator(_whole_number_as_text)]
# YAML has lists; a tuple keeps the object immutable. The items stay strict.
Texts = Annotated[tuple[Text, ...], Field(strict=False)]
TimeLimit = Annotated[Text, Field(pattern=r"^(\d+-)?\d+(:\d{1,2}){0,2}$")]
Memory = Annotated[Text, Field(pattern=r"^\d+[KMGTkmgt]?$")]
SbatchOptions = Annotated[
    tuple[Annotated[str, Field(pattern=r"^--[a-z][^\n]*$")], ...], Field(strict=False)
]
Seconds = Annotated[float, Field(gt=0, le=86400)]
Port = Annotated[int, Field(ge=1, le=65535)]


class Section(BaseModel):
    """Base of all sections: immutable, no coercion, unknown keys refused."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, protected_namespaces=(), allow_inf_nan=False
    )


class ModelConfig(Section):
    """The model, as vLLM is to load it on every engine."""

    name: str = Field(
        min_length=1,
        description="Model folder or Hugging Face id. A relative folder is looked for beside the "
        "file that names it, then in the current folder",
    )
    max_model_len: int = Field(
        default=4096, ge=16, description="Longest prompt plus answer, in tokens"
    )
    gpu_memory_utilization: float = Field(
        default=0.9, gt=0, le=1, description="Share of the GPU's memory for vLLM"
    )
    tensor_parallel_size: int = Field(
        default=1,
        ge=1,
        le=1024,
        description="GPUs (TP ranks) of one engine",
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        default="auto", description="Type of weights and KV cache"
    )
    block_size: int | None = Field(
        default=None, ge=1, le=1024, description="Tokens in one KV block; null lets vLLM choose"
    )


class EngineGroup(Section):
    """The engines of one role."""

    engines: int = Field(default=1, ge=1, le=4096, description="How many engines")
    nodes: int = Field(
        default=1, ge=1, le=4096, description="Nodes that these engines are spread over"
    )
    constraint: str | None = Field(default=None, description="Slurm --constraint of these nodes")
    gres: str | None = Field(default=None, description="Slurm --gres of one node, e.g. gpu:4")
    tensor_parallel_size: int | None = Field(
        default=None,
        ge=1,
        le=1024,
        description="GPUs of one of these engines; null takes the model's",
    )
    vllm_args: Texts = Field(default=(), description="Further arguments for these engines' vLLM")
    env: Mapping[str, Text] = Field(
        default_factory=dict, description="Environment variables of these engines' vLLM"
    )


class RdmaConfig(Section):
    """How KV pages travel."""

    backend: Literal["auto", "verbs", "cuda_ipc", "tcp"] = Field(
        default="auto",
        description="Transport; auto takes the fastest that works between two engines",
    )
    devices: Literal["auto"] | Texts = Field(
        default="auto",
        description="RDMA devices to use, e.g. [mlx5_0, 'mlx5_1:2'] (name:port); auto takes the "
        "nearest to each GPU",
    )
    gid_index: Literal["auto"] | Annotated[int, Field(ge=0, le=255)] = Field(
        default="auto",
        description="GID table index; auto prefers RoCE v2 with an IPv4-mapped address",
    )
    traffic_class: int = Field(
        default=0, ge=0, le=255, description="Of RoCE packets; the DSCP is its upper six bits"
    )
    service_level: int = Field(
        default=0, ge=0, le=15, description="InfiniBand service level, or RoCE priority"
    )
    block_size: Bytes = Field(
        default=1 << 20,
        ge=4096,
        le=8 << 20,
        description="Longest single write; longer runs are sliced",
    )
    queue_depth: int = Field(
        default=1024,
        ge=1,
        le=65536,
        description="Writes in flight to one peer; more wait their turn",
    )
    qps_per_peer: int = Field(default=2, ge=1, le=16, description="QPs (connections) to one peer")
    kv_buffer: Annotated[Bytes, Field(ge=1 << 20)] | None = Field(
        default=None, description="KV cache of one vLLM worker; null lets vLLM choose"
    )
    peer_timeout_s: Seconds = Field(
        default=5.0, description="Silence after which a peer is lost, s"
    )
    connect_timeout_s: Seconds = Field(
        default=15.0, description="Longest set-up of a connection, s"
    )
    transfer_timeout_s: Seconds = Field(
        default=300.0,
        description="Longest wait of decode for one request's KV, prefill's queue included, s; "
        "a dead prefill engine is noticed by peer_timeout_s",
    )
    cancel_timeout_s: Seconds = Field(
        default=5.0, description="Longest wait for a confirmed cancel before the peer is fenced, s"
    )
    lease_s: Seconds = Field(
        default=30.0, description="How long prefill keeps blocks that no decode engine asked for, s"
    )
    checksum: bool = Field(default=False, description="Verify every page on arrival (slower)")
    link: str = Field(
        default="",
        pattern=r"^(\d+(\.\d+)?[MG]B/s(\+\d+(\.\d+)?us)?)?$",
        description="For measurements: pace the transfers to each engine as a link of this rate "
        "(and latency) would, e.g. 25GB/s+5us",
    )
    trace_file: str = Field(
        default="",
        description="For measurements: each prefill worker appends a line of JSON per write to "
        "this file",
    )
    load_failure_policy: Literal["recompute", "fail"] = Field(
        default="recompute", description="What decode does when KV does not arrive"
    )


class OrchestratorConfig(Section):
    """Rank 0: the HTTP service and the supervision of the engines."""

    host: str = Field(
        default="auto",
        min_length=1,
        description="Address that the service binds; auto takes loopback if all ranks share one "
        "host, else the address that the other nodes reach",
    )
    port: Literal["auto"] | Port = Field(
        default="auto", description="Its port; auto takes a free one"
    )
    policy: Literal["least_loaded", "round_robin"] = Field(
        default="least_loaded", description="How the engines of a request are chosen"
    )
    disaggregate_above_tokens: int = Field(
        default=0, ge=0, description="Prompts up to this many tokens go straight to decode"
    )
    api_key: str = Field(
        default="auto",
        min_length=1,
        pattern=r"^[!-~]+$",
        repr=False,
        description="Bearer key; auto makes a random one in the run folder, none switches it off",
    )
    heartbeat_s: Seconds = Field(default=1.0, description="Interval of the engines' heartbeats, s")
    engine_start_timeout_s: Seconds = Field(
        default=600.0, description="Longest start of an engine, s"
    )
    request_timeout_s: Seconds = Field(default=600.0, description="Longest request, s")
    health_timeout_s: Seconds = Field(
        default=10.0, description="Silence after which an engine is restarted, s"
    )
    max_restarts: int = Field(
        default=3, ge=0, description="Restarts of one engine before it is given up"
    )
    max_inflight: int = Field(
        default=256, ge=1, description="Requests admitted at once; more get 429 with Retry-After"
    )

    @model_validator(mode="after")
    def _heartbeats_fit(self) -> OrchestratorConfig:
        if self.health_timeout_s < 2 * self.heartbeat_s:
            raise ValueError(
                f"health_timeout_s ({self.health_timeout_s:g}) must be at least twice "
                f"heartbeat_s ({self.heartbeat_s:g}), or healthy engines are restarted"
            )
        return self


class SlurmConfig(Section):
    """What the job asks Slurm for."""

    account: Text | None = Field(default=None, description="Slurm --account")
    partition: Text | None = Field(default=None, description="Slurm --partition")
    qos: str | None = Field(default=None, description="Slurm --qos")
    time: TimeLimit | None = Field(
        default=None, description="Slurm --time: minutes, h:mm:ss or d-h:mm:ss"
    )
    signal_s: int = Field(
        default=300,
        ge=0,
        le=65535,
        description="How long before the time limit the job is told to drain, s; 0: not at all",
    )
    one_component: bool = Field(
        default=False,
        description="One plain job, split by rank, where all GPUs are alike; else a heterogeneous "
        "job of two components, prefill and decode",
    )
    nodes: int | None = Field(
        default=None,
        ge=1,
        le=4096,
        description="Nodes of a job of one component; null adds prefill.nodes and decode.nodes",
    )
    cpus_per_task: int | None = Field(
        default=None, ge=1, le=4096, description="Slurm --cpus-per-task, CPUs of one engine"
    )
    mem: Memory | None = Field(
        default=None, description="Slurm --mem of one node, e.g. 200G; 0 is all of it"
    )
    exclusive: bool = Field(default=False, description="Slurm --exclusive: whole nodes")
    segment: int | None = Field(
        default=None, ge=1, le=4096, description="Slurm --segment: nodes that stand together"
    )
    options: SbatchOptions = Field(
        default=(),
        description="Further options of sbatch for each component, e.g. [--reservation=x]",
    )
    modules: Texts = Field(default=(), description="Environment modules to load, in order")
    setup: Texts = Field(
        default=(),
        description="Shell lines of the batch script; the ranks on all nodes get its environment",
    )
    mpi: str | None = Field(
        default=None, description="srun --mpi, e.g. pmix; null takes pmi2, which MPICH speaks"
    )
    launcher: Literal["srun", "mpiexec"] = Field(
        default="srun",
        description="What starts the ranks: srun, or MPICH's mpiexec with srun in place of ssh, "
        "for sites whose srun knows no PMI of this MPI",
    )


class JobConfig(Section):
    """A whole job."""

    model: ModelConfig
    prefill: EngineGroup = EngineGroup()
    decode: EngineGroup = EngineGroup()
    rdma: RdmaConfig = RdmaConfig()
    orchestrator: OrchestratorConfig = OrchestratorConfig()
    slurm: SlurmConfig = SlurmConfig()

    @property
    def world_size(self) -> int:
        """MPI ranks of the job: the orchestrator and one for every engine."""
        return 1 + self.prefill.engines + self.decode.engines

    def group(self, role: Role) -> EngineGroup:
        """Return the engine group of `role`."""
        return self.prefill if role == "prefill" else self.decode

    def tp_size(self, role: Role) -> int:
        """Return the GPUs (TP ranks) of one engine of `role`."""
        return self.group(role).tensor_parallel_size or self.model.tensor_parallel_size

    def engine_names(self, role: Role) -> list[str]:
        """Return the engines' names of `role`, in rank order: `["prefill-0", ...]`."""
        return [f"{role}-{index}" for index in range(self.group(role).engines)]
