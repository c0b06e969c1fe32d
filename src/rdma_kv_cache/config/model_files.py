# SPDX-License-Identifier: Apache-2.0
"""Whether a model is complete on disk, so that it is known before GPUs are taken."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

TOKENIZERS = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
)
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.gguf")
_MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit


def missing(folder: Path) -> list[str]:
    """Say what `folder` lacks to be a model that vLLM can load; nothing if it is complete.

    Of safetensors files the length is checked: a download that was cut off is shorter than its own
    header says. Files are not read further.
    """
    return list(_missing(folder))


def cached_folder(name: str, env: Mapping[str, str], revision: str = "main") -> Path | None:
    """Return where the Hugging Face cache holds the model `name` (org/name); None if it does not.

    The cache is that of $HF_HUB_CACHE, else of $HF_HOME.
    """
    model = hub_cache(env) / ("models--" + name.replace("/", "--"))
    try:
        commit = (model / "refs" / revision).read_text(encoding="ascii").strip()
    except OSError:
        commit = revision
    folder = model / "snapshots" / commit
    return folder if folder.is_dir() else None


def hub_cache(env: Mapping[str, str]) -> Path:
    """Return the Hugging Face cache of an environment."""
    if cache := env.get("HF_HUB_CACHE"):
        return Path(cache).expanduser()
    if home := env.get("HF_HOME"):
        return Path(home).expanduser() / "hub"
    base = env.get("XDG_CACHE_HOME") or os.path.join(env.get("HOME", "~"), ".cache")  # noqa: PTH118
    return Path(base).expanduser() / "huggingface" / "hub"


def _missing(folder: Path) -> Iterable[str]:
    if not folder.is_dir():
        yield f"there is no folder {folder}"
        return
    config = _read_json(folder / "config.json")
    if isinstance(config, str):
        yield config
    if not any((folder / name).is_file() for name in TOKENIZERS):
        yield "no tokenizer (tokenizer.json, tokenizer.model, …)"
    yield from _missing_weights(folder)


def _missing_weights(folder: Path) -> Iterable[str]:
    for name in _INDEXES:
        if (folder / name).is_file():
            index = _read_json(folder / name)
            if isinstance(index, str):
                yield index
                return
            files = [folder / file for file in sorted(set(index.get("weight_map", {}).values()))]
            if not files:
                yield f"{name} names no weights"
            break
    else:
        files = sorted(file for pattern in _WEIGHTS for file in folder.glob(pattern))
        if not files:
            yield "no weights (*.safetensors, …)"
    for file in files:
        problem = _file_problem(file)
        if problem:
            yield f"{file.name} {problem}"


def _file_problem(file: Path) -> str | None:
    try:
        size = file.stat().st_size
        if file.suffix != ".safetensors":
            return None if size else "is empty"
        with file.open("rb") as opened:
            header_bytes = int.from_bytes(opened.read(8), "little")
            if not 0 < header_bytes <= min(size, _MAX_HEADER_BYTES):
                return "is no safetensors file"
            header = json.loads(opened.read(header_bytes))
    except FileNotFoundError:
        return "is missing"
    except (OSError, ValueError) as error:
        return f"cannot be read: {error}"
    ends = [tensor["data_offsets"][1] for key, tensor in header.items() if key != "__metadata__"]
    expected = 8 + header_bytes + max(ends, default=0)
    return None if size == expected else f"has {size} of {expected} bytes"


def _read_json(file: Path) -> Any:
    """Return an object, or what is wrong with the file."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"no {file.name}"
    except (OSError, ValueError) as error:
        return f"{file.name} cannot be read: {error}"
    return content if isinstance(content, dict) else f"{file.name} is no JSON object"
