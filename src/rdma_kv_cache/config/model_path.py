# SPDX-License-Identifier: Apache-2.0
"""Which model a name means: a folder on disk or a Hugging Face id."""

from __future__ import annotations

import re
from pathlib import Path

from rdma_kv_cache.config.errors import Problem

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")
_PATH_STARTS = ("/", "./", "../", "~")


def resolve_model(name: str, source: str) -> str | Problem:
    """Return the absolute folder or the id that `name` means, or what is wrong with it.

    A relative folder is looked for beside the file `source`, then in the current folder. A name
    that starts with /, ./, ../ or ~ is a folder; any other may also be an id.
    """
    path = Path(name).expanduser()
    beside = Path(source).parent
    candidates = [(base / path).resolve() for base in dict.fromkeys((beside, Path.cwd()))]
    for folder in candidates:
        if folder.is_dir():
            return _checked_folder(name, folder, source)
    if not name.startswith(_PATH_STARTS) and _HUB_ID.match(name):
        return name
    looked = " nor ".join(str(folder) for folder in dict.fromkeys(candidates))
    return _problem(
        source,
        name,
        f"there is no model folder {looked}",
        "Download the model there, or give a folder that exists or a Hugging Face id (org/name)",
    )


def _checked_folder(name: str, folder: Path, source: str) -> str | Problem:
    if (folder / "config.json").is_file():
        return str(folder)
    return _problem(
        source,
        name,
        f"{folder} holds no config.json, so it is not a model",
        "Point at the folder with config.json, the tokenizer and the weights",
    )


def _problem(source: str, name: str, message: str, remedy: str) -> Problem:
    return Problem(source, "model.name", message, remedy, name)
