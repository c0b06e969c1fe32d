# SPDX-License-Identifier: Apache-2.0
"""The command group. Each command imports what it needs when it runs, so that --help is quick."""

from __future__ import annotations

import click

from rdma_kv_cache import __version__
from rdma_kv_cache.cli.batch import batch
from rdma_kv_cache.cli.config import config
from rdma_kv_cache.cli.doctor import doctor
from rdma_kv_cache.cli.rank import rank
from rdma_kv_cache.cli.serve import serve


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="rdma-kv")
def main() -> None:
    """Disaggregated LLM inference: vLLM prefill and decode engines, KV cache moved by RDMA writes.

    \b
    Example:
      rdma-kv doctor
      rdma-kv batch prompts.jsonl -o answers.jsonl --config jobs/configs/smollm2-135m-1p1d-cpu.yaml
    """


for _command in (serve, batch, doctor, config, rank):
    main.add_command(_command)
