# SPDX-License-Identifier: Apache-2.0
"""What a site says of itself: the section `site:` of the site file, beside its defaults for jobs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, ValidationError, model_validator

from rdma_kv_cache.config.errors import JobError
from rdma_kv_cache.config.explain import explain
from rdma_kv_cache.config.layers import Layers
from rdma_kv_cache.config.load import SITE_SECTION, site_file
from rdma_kv_cache.config.schema import Section
from rdma_kv_cache.config.yaml_file import read_mapping

if TYPE_CHECKING:
    from collections.abc import Mapping

Directive = Literal["gres", "gpus-per-node", "exclusive", "segment", "constraint", "mem"]
Directives = Annotated[tuple[Directive, ...], Field(strict=False)]


class Site(Section):
    """The site."""

    rejects: Directives = Field(
        default=(),
        description="sbatch options that this site refuses. Without gres GPUs are asked for by "
        "gpus-per-node; the others are left out",
    )
    runs: str = Field(
        default="~/rdma-kv-runs",
        min_length=1,
        description="Folder of the jobs' run folders, on a file system that all nodes see; ~ and "
        "$VARIABLES are expanded",
    )
    login_host: str | None = Field(
        default=None,
        description="Name of the login node for ssh from outside; null takes this machine's",
    )
    scratch: str | None = Field(
        default=None, description="Node-local folder that environment and model are staged to"
    )
    model_cache: str | None = Field(
        default=None, description="HF_HOME of login and compute nodes; null leaves it as it is"
    )
    offline: bool = Field(
        default=True,
        description="Nodes download nothing (HF_HUB_OFFLINE=1): models come by rdma-kv fetch",
    )
    mail: str | None = Field(default=None, description="Slurm --mail-user")
    mail_type: str = Field(default="END,FAIL", description="Slurm --mail-type, if mail is set")
    container: Literal["none", "apptainer", "pyxis"] = Field(
        default="none", description="What the ranks run in; the batch script runs outside"
    )
    image: str | None = Field(
        default=None, description="The container's image (.sif, .sqsh or a registry's name)"
    )

    @model_validator(mode="after")
    def _container_has_an_image(self) -> Site:
        if self.container != "none" and not self.image:
            raise ValueError(f"container is {self.container}, so image must be given")
        return self

    @property
    def runs_path(self) -> Path:
        """The runs folder, absolute and expanded."""
        return expanded(self.runs).absolute()


class SiteFile(Section):
    """The part of the site file that is no job's."""

    site: Site = Site()


def load_site(env: Mapping[str, str] = os.environ) -> Site:
    """Return the site file's `site:`, or the defaults where there is no site file.

    Raises JobError naming everything that is wrong.
    """
    path = site_file(env)
    if path is None:
        return Site()
    layers = Layers()
    section = read_mapping(path, "site file").get(SITE_SECTION)
    layers.add({SITE_SECTION: {} if section is None else section}, str(path))
    try:
        return SiteFile.model_validate(layers.values).site
    except ValidationError as error:
        raise JobError(explain(error, layers, str(path), SiteFile)) from error


def expanded(path: str) -> Path:
    """Return `path` with ~ and $VARIABLES expanded."""
    return Path(os.path.expandvars(path)).expanduser()
