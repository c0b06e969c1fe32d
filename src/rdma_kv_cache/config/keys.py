# SPDX-License-Identifier: Apache-2.0
"""The table of all keys, made from the schema so that it cannot go stale."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NamedTuple

from rdma_kv_cache.config.schema import JobConfig

if TYPE_CHECKING:
    from pydantic import BaseModel


class KeyRow(NamedTuple):
    """One line of the table; all four are texts for people."""

    key: str
    type: str
    default: str
    description: str


def key_rows(root: type[BaseModel] = JobConfig) -> list[KeyRow]:
    """Return every key of a file whose sections are the fields of `root`, in its order."""
    rows = []
    for section, field in root.model_fields.items():
        model: type[BaseModel] = field.annotation  # type: ignore[assignment]
        schema = model.model_json_schema()
        required = schema.get("required", ())
        for name, entry in schema["properties"].items():
            default = "required" if name in required else json.dumps(entry.get("default", {}))
            rows.append(
                KeyRow(f"{section}.{name}", _type_text(entry), default, entry["description"])
            )
    return rows


def _type_text(entry: dict[str, Any]) -> str:
    if "anyOf" in entry:
        return " | ".join(_type_text(option) for option in entry["anyOf"])
    if "const" in entry:
        return str(entry["const"])
    if "enum" in entry:
        return " | ".join(entry["enum"])
    kind: str = entry["type"]
    if kind == "array":
        return "list of strings"
    if kind == "object":
        return "mapping of strings"
    return str(entry.get("format", kind)) + _limits(entry)


def _limits(entry: dict[str, Any]) -> str:
    lower = entry.get("minimum", entry.get("exclusiveMinimum"))
    upper = entry.get("maximum")
    if lower is None:
        return ""
    sign = ">=" if "minimum" in entry else ">"
    if upper is None:
        return f" {sign} {lower}"
    return f" {lower}..{upper}" if "minimum" in entry else f" > {lower}, <= {upper}"
