# SPDX-License-Identifier: Apache-2.0
"""The command group. Each command imports what it needs when it runs, so that --help is quick."""

from __future__ import annotations

import click

from rdma_kv_cache import __version__
from rdma_kv_cache.cli.adopt import adopt
from rdma_kv_cache.cli.batch import batch
from rdma_kv_cache.cli.config import config
from rdma_kv_cache.cli.doctor import doctor
from rdma_kv_cache.cli.fetch import fetch
from rdma_kv_cache.cli.init import init_site
from rdma_kv_cache.cli.list import list_jobs
from rdma_kv_cache.cli.logs import logs
from rdma_kv_cache.cli.rank import rank
from rdma_kv_cache.cli.render import render
from rdma_kv_cache.cli.serve import serve
from rdma_kv_cache.cli.status import status
from rdma_kv_cache.cli.stop import stop
from rdma_kv_cache.cli.submit import submit


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="rdma-kv")
def main() -> None:
    """Disaggregated LLM inference: vLLM prefill and decode engines, KV cache moved by RDMA writes.

    \b
    Example:
      rdma-kv doctor
      rdma-kv batch prompts.jsonl -o answers.jsonl --config jobs/configs/smollm2-135m-1p1d-cpu.yaml
    """


for _command in (
    serve,
    batch,
    submit,
    render,
    init_site,
    fetch,
    list_jobs,
    status,
    logs,
    stop,
    doctor,
    config,
    rank,
    adopt,
):
    main.add_command(_command)
