# SPDX-License-Identifier: Apache-2.0
"""`rdma-kv fetch` brings whole models to where jobs look for them, and tells what is not whole."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from rdma_kv_cache.config.model_files import cached_folder, missing
from tests.cli.hub import COMMIT, running_hub

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

MODEL = "org/tiny"


def safetensors(data_bytes: int = 64) -> bytes:
    tensor = {"dtype": "U8", "shape": [data_bytes], "data_offsets": [0, data_bytes]}
    header = json.dumps({"__metadata__": {"format": "pt"}, "weight": tensor}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(data_bytes)


FILES = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    "model.safetensors": safetensors(),
    "pytorch_model.bin": b"the same again",
}


def write(folder: Path, files: Mapping[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def fetch(
    *arguments: str | Path, home: Path, **env: str | Path
) -> subprocess.CompletedProcess[str]:
    """A process of its own: huggingface_hub reads the environment when it is imported."""
    kept = {key: text for key, text in os.environ.items() if not key.startswith(("HF_", "RDMA_KV"))}
    return subprocess.run(
        [sys.executable, "-m", "rdma_kv_cache.cli", "fetch", *map(str, arguments)],
        env={**kept, "HOME": str(home), **{key: str(text) for key, text in env.items()}},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_whole_model_lacks_nothing(tmp_path: Path) -> None:
    assert missing(write(tmp_path, FILES)) == []


def test_each_gap_is_named(tmp_path: Path) -> None:
    assert missing(tmp_path / "none") == [f"there is no folder {tmp_path / 'none'}"]
    assert missing(tmp_path) == [
        "no config.json",
        "no tokenizer (tokenizer.json, tokenizer.model, …)",
        "no weights (*.safetensors, …)",
    ]
    write(tmp_path, {**FILES, "config.json": b"[]", "model.safetensors": safetensors()[:-1]})
    size = len(safetensors())
    assert missing(tmp_path) == [
        "config.json is no JSON object",
        f"model.safetensors has {size - 1} of {size} bytes",
    ]
    write(tmp_path, {**FILES, "model.safetensors": b"<html>Not Found</html>"})
    assert missing(tmp_path) == ["model.safetensors is no safetensors file"]


def test_index_says_which_weights_there_must_be(tmp_path: Path) -> None:
    index = {"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}}
    files = {**FILES, "model.safetensors.index.json": json.dumps(index).encode()}
    write(tmp_path, {**files, "model-1-of-2.safetensors": safetensors()})
    assert missing(tmp_path) == ["model-2-of-2.safetensors is missing"]


def test_download_lands_in_the_cache_of_the_site_once(tmp_path: Path) -> None:
    site = tmp_path / "site.yaml"
    site.write_text(f"site:\n  model_cache: {tmp_path}/cache\n")
    with running_hub(MODEL, FILES) as hub:
        env = {"HF_ENDPOINT": hub.url, "RDMA_KV_SITE": site, "HF_HUB_CACHE": tmp_path / "other"}
        done = fetch(MODEL, home=tmp_path, **env)
        assert done.returncode == 0, done.stderr
        again = fetch(MODEL, "--json", home=tmp_path, **env)
    folder = cached_folder(MODEL, {"HF_HOME": f"{tmp_path}/cache"})
    assert folder is not None
    assert folder.name == COMMIT
    assert done.stdout == f"{folder}\n"
    report = {"model": MODEL, "folder": str(folder), "complete": True, "missing": []}
    assert json.loads(again.stdout) == report
    # Once each, and the same weights in another format not at all.
    assert sorted(hub.downloaded) == ["config.json", "model.safetensors", "tokenizer.json"]


def test_download_into_a_folder_that_a_job_file_can_name(tmp_path: Path) -> None:
    target = tmp_path / "models" / "tiny"
    with running_hub(MODEL, FILES) as hub:
        done = fetch(MODEL, "--to", target, "--all-formats", home=tmp_path, HF_ENDPOINT=hub.url)
    assert done.returncode == 0, done.stderr
    assert {name: (target / name).read_bytes() for name in FILES} == FILES


def test_model_whose_repository_lacks_weights_is_not_complete(tmp_path: Path) -> None:
    files = {name: FILES[name] for name in ("config.json", "tokenizer.json")}
    with running_hub(MODEL, files) as hub:
        done = fetch(MODEL, home=tmp_path, HF_ENDPOINT=hub.url)
    assert done.returncode == 1
    assert "no weights" in done.stderr


@pytest.mark.parametrize(
    ("model", "code", "message"),
    [
        ("org/other", 1, "cannot fetch org/other"),
        ("not a model", 2, "is no Hugging Face id"),
    ],
)
def test_what_cannot_be_fetched_is_said(
    tmp_path: Path, model: str, code: int, message: str
) -> None:
    with running_hub(MODEL, FILES) as hub:
        done = fetch(model, home=tmp_path, HF_ENDPOINT=hub.url)
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_no_hub_at_all_is_said(tmp_path: Path) -> None:
    done = fetch(MODEL, home=tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    assert done.returncode == 1
    assert f"cannot fetch {MODEL}" in done.stderr
    assert "Traceback" not in done.stderr


def test_check_needs_no_network(tmp_path: Path) -> None:
    env = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    whole = write(tmp_path / "whole", FILES)
    assert fetch("--check", whole, home=tmp_path, **env).stdout == f"{whole}\n"

    (whole / "model.safetensors").unlink()
    (whole / "pytorch_model.bin").unlink()
    done = fetch("--check", whole, home=tmp_path, **env)
    assert (done.returncode, done.stdout) == (1, "")
    assert "no weights" in done.stderr

    done = fetch("--check", MODEL, home=tmp_path, **env)
    assert done.returncode == 1
    assert f"it is not in {tmp_path}/.cache/huggingface/hub" in done.stderr
