# SPDX-License-Identifier: Apache-2.0
"""OpenAI Batch lines in: one JSON object a line, plain or gzip, read as a stream.

The shape is that of OpenAI's Batch API: `custom_id`, `method`, `url`, `body`.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from rdma_kv_cache.batch.errors import BatchError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

URLS = ("/v1/chat/completions", "/v1/completions")
MAX_LINE_BYTES = 64 << 20
MAX_CUSTOM_ID_CHARS = 512


@dataclass(frozen=True)
class Request:
    """A line that can be sent. `line` counts from 1."""

    line: int
    custom_id: str
    url: str
    body: dict[str, Any]


@dataclass(frozen=True)
class Rejected:
    """A line that cannot, and why; `custom_id` is None if the line has no usable one."""

    line: int
    custom_id: str | None
    code: str
    message: str


@dataclass(frozen=True)
class InputInfo:
    """What identifies a prompt file: SHA-256 of its (uncompressed) bytes; its non-blank lines."""

    sha256: str
    lines: int


class _LineError(Exception):
    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def open_binary(path: Path, mode: str) -> BinaryIO:
    """Open `path` ("rb" or "wb"), through gzip if its name ends in .gz."""
    if path.suffix == ".gz":
        return cast("BinaryIO", gzip.open(path, mode))
    return cast("BinaryIO", path.open(mode))


def scan(path: Path) -> InputInfo:
    """Read the whole prompt file once. Raises BatchError if it cannot be read or is empty."""
    digest = hashlib.sha256()
    try:
        lines = sum(1 for _ in _numbered(path, digest.update))
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise BatchError(f"{path}: not a whole gzip file ({error}). Compress it again.") from error
    except OSError as error:
        raise BatchError(f"{path}: cannot read prompts: {error.strerror}.") from error
    if not lines:
        raise BatchError(f"{path}: holds no prompts. Give one OpenAI Batch request a line.")
    return InputInfo(digest.hexdigest(), lines)


def read_requests(path: Path) -> Iterator[Request | Rejected]:
    """Yield every non-blank line of the prompt file, in order."""
    first_use: dict[str, int] = {}
    for number, data in _numbered(path):
        custom_id = None
        try:
            content = _parse(data)
            custom_id = _custom_id(content)
            _check_first_use(custom_id, number, first_use)
            yield Request(number, custom_id, _url(content), _body(content))
        except _LineError as error:
            yield Rejected(number, custom_id, error.code, str(error))


def _numbered(
    path: Path, on_data: Callable[[bytes], object] = len
) -> Iterator[tuple[int, bytes | None]]:
    """Yield (line number, bytes) of non-blank lines; None stands for a line that is too long.

    `on_data` sees every byte of the file.
    """
    with open_binary(path, "rb") as file:
        number = 0
        while data := file.readline(MAX_LINE_BYTES):
            number += 1
            on_data(data)
            if len(data) == MAX_LINE_BYTES and not data.endswith(b"\n"):
                while not data.endswith(b"\n") and (data := file.readline(MAX_LINE_BYTES)):
                    on_data(data)
                yield number, None
            elif data := data.removeprefix(b"\xef\xbb\xbf").strip():
                yield number, data


def _parse(data: bytes | None) -> dict[str, Any]:
    if data is None:
        raise _LineError("line_too_long", f"the line is longer than {MAX_LINE_BYTES >> 20} MiB")
    try:
        content = json.loads(data.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise _LineError(
            "invalid_json", f"not UTF-8: {error.reason} at byte {error.start}"
        ) from None
    except RecursionError:
        raise _LineError("invalid_json", "nested too deeply") from None
    except ValueError as error:
        raise _LineError("invalid_json", f"not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise _LineError("invalid_line", f"expected a JSON object, got {_kind(content)}")
    return content


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _custom_id(content: dict[str, Any]) -> str:
    custom_id: str = _field(content, "custom_id", str)
    if not 0 < len(custom_id) <= MAX_CUSTOM_ID_CHARS:
        raise _LineError(
            "invalid_custom_id",
            f"custom_id has {len(custom_id)} characters, allowed are 1 to {MAX_CUSTOM_ID_CHARS}",
        )
    return custom_id


def _check_first_use(custom_id: str, number: int, first_use: dict[str, int]) -> None:
    first = first_use.setdefault(custom_id, number)
    if first != number:
        raise _LineError(
            "duplicate_custom_id", f"custom_id {custom_id!r} is already used by line {first}"
        )


def _url(content: dict[str, Any]) -> str:
    method: str = _field(content, "method", str)
    if method != "POST":
        raise _LineError("invalid_method", f"method is {method!r}, only 'POST' is supported")
    url: str = _field(content, "url", str)
    if url not in URLS:
        raise _LineError("invalid_url", f"url is {url!r}, supported are {' and '.join(URLS)}")
    return url


def _body(content: dict[str, Any]) -> dict[str, Any]:
    body: dict[str, Any] = _field(content, "body", dict)
    if body.get("stream"):
        raise _LineError("invalid_body", "body.stream is set; a batch cannot stream, remove it")
    return body


def _field(content: dict[str, Any], name: str, kind: type) -> Any:
    if name not in content:
        raise _LineError("missing_field", f"{name} is missing")
    value = content[name]
    if not isinstance(value, kind):
        expected = "an object" if kind is dict else "a string"
        raise _LineError(f"invalid_{name}", f"{name} must be {expected}, not {_kind(value)}")
    return value


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    return "null" if value is None else names.get(type(value), "a number")
