# SPDX-License-Identifier: Apache-2.0
"""From site file, job file, environment and command line to one JobConfig."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import ValidationError

from rdma_kv_cache.config.errors import JobError, Problem
from rdma_kv_cache.config.explain import explain
from rdma_kv_cache.config.layers import Layers
from rdma_kv_cache.config.model_path import resolve_model
from rdma_kv_cache.config.schema import JobConfig
from rdma_kv_cache.config.yaml_file import parse_scalar, read_mapping

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

SITE_SECTION = "site"
"""Of the site file: what holds for the site and is no job's key (slurm/site.py)."""
_ENV_KEYS = {
    "MODEL_NAME": "name",
    "MODEL_MAX_LEN": "max_model_len",
    "GPU_MEMORY_UTILIZATION": "gpu_memory_utilization",
    "TENSOR_PARALLEL_SIZE": "tensor_parallel_size",
}


def load_job(
    path: str | Path, env: Mapping[str, str] = os.environ, overrides: Sequence[str] = ()
) -> JobConfig:
    """Read and validate the job file `path`.

    `overrides` are `section.key=value` texts of the command line. Precedence: overrides, `env`
    (MODEL_NAME, MODEL_MAX_LEN, GPU_MEMORY_UTILIZATION, TENSOR_PARALLEL_SIZE), job file, site file
    ($RDMA_KV_SITE, else ~/.config/rdma-kv/site.yaml if there is one). With `env={}` the job file
    stands alone. Raises JobError naming everything that is wrong.
    """
    path = Path(path)
    layers = Layers()
    site = site_file(env)
    if site is not None:
        defaults = read_mapping(site, "site file")
        defaults.pop(SITE_SECTION, None)
        layers.add(defaults, str(site))
    layers.add(read_mapping(path, "job file"), str(path))
    for variable, name in _ENV_KEYS.items():
        if text := env.get(variable):
            value = text if name == "name" else parse_scalar(text)
            layers.set(("model", name), value, f"environment variable {variable}")
    for override in overrides:
        key, value = parse_override(override)
        layers.set(key, value, "--set")
    return _validate(layers, path)


def check_site_file(path: Path) -> None:
    """Check the defaults for jobs in the site file `path`. Raises JobError naming all that is wrong."""
    layers = Layers()
    # A job needs a model, which is no matter of the site.
    layers.set(("model", "name"), "org/model", "")
    defaults = read_mapping(path, "site file")
    defaults.pop(SITE_SECTION, None)
    layers.add(defaults, str(path))
    _validate(layers, path)


def dump_job(job: JobConfig) -> str:
    """Return `job` as YAML that `load_job(…, env={})` reads back to an equal object."""
    return yaml.safe_dump(job.model_dump(mode="json"), sort_keys=False)


def _validate(layers: Layers, path: Path) -> JobConfig:
    problems: list[Problem] = []
    model = layers.values.get("model")
    if isinstance(model, dict) and isinstance(model.get("name"), str) and model["name"]:
        source = layers.source(("model", "name"))
        resolved = resolve_model(model["name"], source)
        if isinstance(resolved, Problem):
            problems.append(resolved)
        else:
            model["name"] = resolved
    try:
        job = JobConfig.model_validate(layers.values)
    except ValidationError as error:
        raise JobError(explain(error, layers, str(path)) + problems) from error
    if problems:
        raise JobError(problems)
    return job


def site_file(env: Mapping[str, str]) -> Path | None:
    """Return the site file: $RDMA_KV_SITE, else ~/.config/rdma-kv/site.yaml if there is one."""
    if named := env.get("RDMA_KV_SITE"):
        return Path(named)
    usual = usual_site_file(env)
    return usual if usual is not None and usual.is_file() else None


def usual_site_file(env: Mapping[str, str]) -> Path | None:
    """Return where a user's site file is looked for; None without a home."""
    home = env.get("HOME")
    return Path(home) / ".config" / "rdma-kv" / "site.yaml" if home else None


def parse_override(text: str) -> tuple[tuple[str, ...], Any]:
    """Return key and value of a `section.key=value` text. Raises JobError."""
    name, equals, value = text.partition("=")
    parts = tuple(name.strip().split("."))
    if not equals or len(parts) < 2 or not all(parts):
        raise JobError(
            [
                Problem(
                    "--set",
                    "",
                    f"{text!r} is not section.key=value",
                    "Example: rdma.queue_depth=256",
                )
            ]
        )
    return parts, parse_scalar(value)
