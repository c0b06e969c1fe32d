# SPDX-License-Identifier: Apache-2.0
"""The progress file: append-only, one finished line each, so that a killed run can go on.

The first line is the fingerprint of the run; each further line is one finished request with
its final output line inside. Whatever follows the last whole line is the torn tail of a killed
run; it is cut off, and its requests run again.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
from typing import TYPE_CHECKING, Any, BinaryIO, TypedDict, cast

import msgspec

from rdma_kv_cache.batch.errors import BatchError
from rdma_kv_cache.batch.lines import open_binary

if TYPE_CHECKING:
    from pathlib import Path


class Fingerprint(msgspec.Struct, frozen=True, tag="rdma-kv batch progress 1"):
    """What must be the same for a run to be continued."""

    input_sha256: str
    model: str


class _Entry(TypedDict):
    line: int
    ok: bool
    retryable: bool
    result: dict[str, Any]


def progress_path(out: Path) -> Path:
    """Return the progress file of the output file `out`."""
    return out.with_name(out.name + ".progress.jsonl")


def check_input(out: Path, input_sha256: str) -> None:
    """Raise BatchError if a progress file of `out` belongs to other prompts.

    For a quick refusal before engines start; `Progress` checks the rest of the fingerprint.
    """
    path = progress_path(out)
    if path.is_file():
        with path.open("rb") as file:
            head = file.readline()
        if head.endswith(b"\n") and _fingerprint(path, head).input_sha256 != input_sha256:
            raise _mismatch(path, "other prompts (their SHA-256 differs)")


class Progress:
    """An open progress file, locked against a second run.

    `failed` and `retryable` are line numbers. A line whose failure may pass is retryable; when the
    file is opened again such a line is pending.
    """

    def __init__(self, path: Path, fingerprint: Fingerprint, *, restart: bool = False) -> None:
        """Open or make the file. Raises BatchError on another fingerprint or a second run."""
        self.path = path
        self.failed: set[int] = set()
        self.retryable: set[int] = set()
        self.dropped_bytes = 0
        self._offsets: dict[int, int] = {}
        self._file: BinaryIO = path.open("a+b")
        try:
            self._lock()
            self._end = 0 if restart else self._load(fingerprint)
            self._file.truncate(self._end)
            if not self._end:
                self._write(msgspec.json.encode(fingerprint))
            self.sync()
        except BaseException:
            self._file.close()
            raise
        self.done_before = len(self._offsets)

    def pending(self, line: int) -> bool:
        """Whether `line` has no result yet."""
        return line not in self._offsets

    @property
    def done(self) -> int:
        """How many lines have a result, good or bad."""
        return len(self._offsets)

    def append(self, line: int, result: dict[str, Any], *, ok: bool, retryable: bool) -> None:
        """Record the output line `result`. It survives a kill at once, a power cut after sync."""
        entry = _Entry(line=line, ok=ok, retryable=retryable, result=result)
        self._note(line, self._end, ok=ok, retryable=retryable)
        self._write(json.dumps(entry).encode())

    def sync(self) -> None:
        """Force what was appended to disk. May run in another thread than append."""
        os.fsync(self._file.fileno())

    def write_output(self, out: Path) -> None:
        """Write all results to `out`, in the order of the input, all or nothing."""
        temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp{out.suffix}")
        try:
            with open_binary(temporary, "wb") as file:
                for line in sorted(self._offsets):
                    self._file.seek(self._offsets[line])
                    entry: _Entry = json.loads(self._file.readline())
                    file.write(json.dumps(entry["result"]).encode() + b"\n")
            with temporary.open("rb") as written:
                os.fsync(written.fileno())
            temporary.replace(out)
        finally:
            temporary.unlink(missing_ok=True)

    def remove(self) -> None:
        """Delete the file, when the output file holds everything."""
        self.path.unlink()

    def close(self) -> None:
        """Close the file, which also ends the lock."""
        # It tries to write what append could not; append has told of it.
        with contextlib.suppress(OSError):
            self._file.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            # Some cluster file systems have no flock (ENOSYS, ENOLCK); then a second run is the
            # user's own care.
            if error.errno == errno.EWOULDBLOCK:
                raise BatchError(
                    f"{self.path}: another run is writing this output. Wait for it or stop it, or "
                    "choose another -o."
                ) from error

    def _load(self, fingerprint: Fingerprint) -> int:
        """Read what is there and return the offset behind the last whole line."""
        self._file.seek(0)
        head = self._file.readline()
        if not head.endswith(b"\n"):
            return 0
        if (found := _fingerprint(self.path, head)) != fingerprint:
            if found.input_sha256 != fingerprint.input_sha256:
                raise _mismatch(self.path, "other prompts (their SHA-256 differs)")
            raise _mismatch(
                self.path, f"model {found.model!r}, this run uses {fingerprint.model!r}"
            )
        end = len(head)
        for data in self._file:
            entry = _entry(data)
            if entry is None:
                break
            self._note(entry["line"], end, ok=entry["ok"], retryable=entry["retryable"])
            end += len(data)
        for line in self.retryable:
            del self._offsets[line]
            self.failed.discard(line)
        self.retryable.clear()
        self.dropped_bytes = self.path.stat().st_size - end
        return end

    def _note(self, line: int, offset: int, *, ok: bool, retryable: bool) -> None:
        self._offsets[line] = offset
        self.failed.discard(line)
        self.retryable.discard(line)
        if not ok:
            self.failed.add(line)
        if retryable:
            self.retryable.add(line)

    def _write(self, data: bytes) -> None:
        self._file.write(data + b"\n")
        self._file.flush()
        self._end += len(data) + 1


def _entry(data: bytes) -> _Entry | None:
    """Return the entry, None if `data` is not a whole one.

    By the standard library, since msgspec refuses the lone surrogates that JSON may hold.
    """
    try:
        entry = json.loads(data) if data.endswith(b"\n") else None
    except ValueError:
        return None
    is_entry = isinstance(entry, dict) and entry.keys() == _Entry.__annotations__.keys()
    return cast("_Entry", entry) if is_entry else None


def _fingerprint(path: Path, head: bytes) -> Fingerprint:
    try:
        return msgspec.json.decode(head, type=Fingerprint)
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise BatchError(
            f"{path}: exists and is not a progress file. Move it away, or use --restart to "
            "overwrite it."
        ) from None


def _mismatch(path: Path, what: str) -> BatchError:
    return BatchError(
        f"{path}: the run that stopped there had {what}. Use --restart to throw its results away "
        "and begin anew, or choose another -o."
    )
