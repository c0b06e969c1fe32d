# SPDX-License-Identifier: Apache-2.0
"""Pydantic's errors as Problems: file, dotted key, value, remedy."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from rdma_kv_cache.config.errors import MISSING, Problem
from rdma_kv_cache.config.keys import key_rows
from rdma_kv_cache.config.schema import JobConfig

if TYPE_CHECKING:
    from pydantic import ValidationError
    from pydantic_core import ErrorDetails

    from rdma_kv_cache.config.layers import Layers


def explain(
    error: ValidationError, layers: Layers, file: str, root: type[BaseModel] = JobConfig
) -> list[Problem]:
    """Return one Problem for each wrong key; the branches of a union are joined by "or".

    `file` is where a missing key was to be; the fields of `root` are the file's sections.
    """
    grouped: dict[tuple[str, ...], list[ErrorDetails]] = {}
    for detail in error.errors():
        grouped.setdefault(_key(detail, root), []).append(detail)
    return [_problem(key, details, layers, file, root) for key, details in grouped.items()]


def _key(detail: ErrorDetails, root: type[BaseModel]) -> tuple[str, ...]:
    """Return the key without what pydantic adds for the branches of a union."""
    names = tuple(str(part) for part in detail["loc"])
    if len(names) < 3:
        return names
    section = _sections(root).get(names[0])
    is_mapping = section is not None and names[1] == "env"
    return names[:3] if is_mapping else names[:2]


def _problem(
    key: tuple[str, ...],
    details: list[ErrorDetails],
    layers: Layers,
    file: str,
    root: type[BaseModel],
) -> Problem:
    first = details[0]
    source = layers.source(key) or file
    dotted = ".".join(key)
    if first["type"] == "extra_forbidden":
        return Problem(source, dotted, "unknown key", _nearest(key, root), _value(first["input"]))
    if first["type"] == "missing":
        return Problem(source, dotted, "required, and not given", _remedy(key, root))
    message = ", or ".join(dict.fromkeys(_message(detail) for detail in details))
    is_secret = dotted == "orchestrator.api_key"
    value = MISSING if is_secret else _value(first["input"])
    return Problem(source, dotted, message, _remedy(key, root), value)


def _message(detail: ErrorDetails) -> str:
    message = detail["msg"].removeprefix("Value error, ").rstrip(".")
    return (
        message.replace("Input should", "should")
        .replace("valid tuple", "list")
        .replace("valid dictionary", "mapping of keys")
    )


def _value(value: Any) -> Any:
    return MISSING if isinstance(value, (dict, BaseModel)) else value


def _nearest(key: tuple[str, ...], root: type[BaseModel]) -> str:
    fields = root.model_fields if len(key) == 1 else _sections(root)[key[0]].model_fields
    valid = ", ".join(fields)
    where = "sections" if len(key) == 1 else f"keys of {key[0]}"
    near = difflib.get_close_matches(key[-1], fields, n=1)
    if near:
        return f"Did you mean {'.'.join((*key[:-1], near[0]))}? Valid {where}: {valid}"
    elsewhere = [
        f"{name}.{key[-1]}" for name, s in _sections(root).items() if key[-1] in s.model_fields
    ]
    if elsewhere:
        return f"Did you mean {' or '.join(elsewhere)}? Valid {where}: {valid}"
    return f"Valid {where}: {valid}"


def _remedy(key: tuple[str, ...], root: type[BaseModel]) -> str:
    rows = {row.key: row for row in key_rows(root)}
    if row := rows.get(".".join(key[:2])):
        return f"Expected {row.type} ({row.description})"
    section = _sections(root).get(key[0])
    fields = section.model_fields if section else root.model_fields
    return f"Keys of {key[0]}: {', '.join(fields)}"


def _sections(root: type[BaseModel]) -> dict[str, type[BaseModel]]:
    sections = {}
    for name, field in root.model_fields.items():
        assert isinstance(field.annotation, type)
        sections[name] = field.annotation
    return sections
