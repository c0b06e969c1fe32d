# SPDX-License-Identifier: Apache-2.0
"""Reading YAML without its traps: a key given twice is an error, and 4:00:00 is not a number."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import yaml

from rdma_kv_cache.config.errors import JobError, Problem

if TYPE_CHECKING:
    from collections.abc import Hashable
    from pathlib import Path


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses duplicate keys and knows decimal integers only.

    YAML 1.1 reads `4:00:00` as 14400 and `010` as 8; both stay text here.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key.value!r} is given twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag != "tag:yaml.org,2002:int"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"^[-+]?(0|[1-9][0-9]*)$"), list("-+0123456789")
)


def parse_scalar(text: str) -> Any:
    """Parse `text` as one YAML value; text that is not YAML is itself."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        return text


def read_mapping(path: Path, what: str) -> dict[str, Any]:
    """Read the YAML file `path` (`what` names it in errors). Raises JobError."""
    try:
        text = path.read_text(encoding="utf-8")
        content = yaml.load(text, Loader=_Loader)
    except OSError as error:
        raise _unreadable(
            path, f"cannot read the {what}: {error.strerror}", "Check the path"
        ) from error
    except UnicodeDecodeError as error:
        raise _unreadable(path, f"not UTF-8 text: {error}", "Save the file as UTF-8") from error
    except yaml.YAMLError as error:
        raise _unreadable(path, f"not valid YAML: {_where(error)}", "Correct that line") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise _unreadable(
            path,
            f"a {what} is a mapping of sections, this is a {type(content).__name__}",
            "Start from a file in jobs/configs",
        )
    return content


def _unreadable(path: Path, message: str, remedy: str) -> JobError:
    return JobError([Problem(str(path), "", message, remedy)])


def _where(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error)
    return f"line {mark.line + 1}: {problem}" if mark else str(problem)
