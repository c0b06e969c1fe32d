# SPDX-License-Identifier: Apache-2.0
"""`rdma-kv fetch`: a model onto the file system that all nodes see, before nodes need it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import click

from rdma_kv_cache.cli import common

EXIT_INCOMPLETE = 1
# Weights in other formats than safetensors would double the download.
UNUSED_FORMATS = ("*.bin", "*.pt", "*.pth", "*.msgpack", "*.h5", "*.ot", "*.onnx", "original/*")


@click.command(short_help="Download a model on the login node, or check that it is complete.")
@click.argument("model")
@click.option(
    "--to",
    "target",
    type=click.Path(path_type=Path),
    help="A plain folder for it, to be named in the job file.  [default: the Hugging Face cache]",
)
@click.option("--revision", default="main", show_default=True, help="Branch, tag or commit.")
@click.option("--check", is_flag=True, help="Download nothing; say whether it is complete.")
@click.option("--all-formats", is_flag=True, help="Also weights that are not safetensors.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a line.")
def fetch(
    model: str, target: Path | None, revision: str, check: bool, all_formats: bool, as_json: bool
) -> None:
    """Download MODEL (a Hugging Face id, org/name) and check that it is complete.

    For nodes without a way out: jobs run with HF_HUB_OFFLINE=1. It goes to the cache that jobs use:
    site.model_cache of the site file, else $HF_HOME. What is there already is not downloaded again.
    With --check MODEL may be a folder too. HF_TOKEN and HF_ENDPOINT are honoured.

    Exit code: 0 if the model is complete, 1 if it is not or the download failed, 2 for bad input.

    \b
    Example:
      rdma-kv fetch meta-llama/Llama-3.1-8B-Instruct
      rdma-kv fetch --check models/smollm2-135m
      rdma-kv fetch org/name --to /shared/models/name
    """
    from rdma_kv_cache.config.model_files import missing

    _use_cache_of_site()
    folder = (
        _find(model, target, revision) if check else _download(model, target, revision, all_formats)
    )
    problems = [f"it is not in {_place(target)}"] if folder is None else missing(folder)
    if as_json:
        where = None if folder is None else str(folder)
        content = {"model": model, "folder": where, "complete": not problems, "missing": problems}
        click.echo(json.dumps(content, indent=2))
    elif problems:
        common.say(f"{model} is not complete:")
        for problem in problems:
            common.say(f"  {problem}")
    else:
        click.echo(folder)
    raise SystemExit(EXIT_INCOMPLETE if problems else 0)


def _use_cache_of_site() -> None:
    """Put the cache where jobs will look for it."""
    from rdma_kv_cache.config import JobError
    from rdma_kv_cache.slurm.site import expanded, load_site

    try:
        cache = load_site(os.environ).model_cache
    except JobError as error:
        raise common.InputError(str(error)) from error
    if cache:
        os.environ.pop("HF_HUB_CACHE", None)
        os.environ["HF_HOME"] = str(expanded(cache))


def _place(target: Path | None) -> Path:
    from rdma_kv_cache.config.model_files import hub_cache

    return target or hub_cache(os.environ)


def _find(model: str, target: Path | None, revision: str) -> Path | None:
    from rdma_kv_cache.config.model_files import cached_folder

    if target is not None:
        return target if target.is_dir() else None
    folder = Path(model).expanduser()
    return folder if folder.is_dir() else cached_folder(model, os.environ, revision)


def _download(model: str, target: Path | None, revision: str, all_formats: bool) -> Path:
    try:
        # Not before _use_cache_of_site: it reads the environment once.
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.errors import HTTPError as HubError  # type: ignore[attr-defined]
    except ImportError as error:
        raise click.ClickException(
            "huggingface_hub is not installed here: pip install huggingface_hub. "
            "`rdma-kv fetch --check` works without."
        ) from error
    try:
        done = snapshot_download(
            model,
            revision=revision,
            local_dir=target,
            ignore_patterns=None if all_formats else list(UNUSED_FORMATS),
        )
    except HFValidationError as error:
        raise common.InputError(f"{model} is no Hugging Face id (org/name): {error}") from error
    except (OSError, RuntimeError, HubError) as error:
        raise click.ClickException(f"cannot fetch {model}: {error}") from error
    return Path(done)
