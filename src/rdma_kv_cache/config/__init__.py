# SPDX-License-Identifier: Apache-2.0
"""The job file: one YAML file, read into validated, immutable objects."""

from rdma_kv_cache.config.errors import JobError, Problem
from rdma_kv_cache.config.keys import KeyRow, key_rows
from rdma_kv_cache.config.load import dump_job, load_job
from rdma_kv_cache.config.schema import (
    EngineGroup,
    JobConfig,
    ModelConfig,
    OrchestratorConfig,
    RdmaConfig,
    Role,
    SlurmConfig,
)

__all__ = [
    "EngineGroup",
    "JobConfig",
    "JobError",
    "KeyRow",
    "ModelConfig",
    "OrchestratorConfig",
    "Problem",
    "RdmaConfig",
    "Role",
    "SlurmConfig",
    "dump_job",
    "key_rows",
    "load_job",
]
