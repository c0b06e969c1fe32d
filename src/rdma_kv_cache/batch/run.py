# SPDX-License-Identifier: Apache-2.0
"""A prompt file in, an answer file out: exactly one line for each, in the same order."""

from __future__ import annotations

import asyncio
import itertools
import signal
import uuid
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import aiohttp

from rdma_kv_cache.batch import kv_metrics
from rdma_kv_cache.batch.client import Client
from rdma_kv_cache.batch.display import Display
from rdma_kv_cache.batch.errors import ServerGoneError
from rdma_kv_cache.batch.lines import Rejected, read_requests
from rdma_kv_cache.batch.progress import Fingerprint, Progress, progress_path
from rdma_kv_cache.batch.state import BatchState, write_state
from rdma_kv_cache.batch.stop import StopSignals
from rdma_kv_cache.batch.tally import Tally

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from rich.console import Console

    from rdma_kv_cache.batch.client import Outcome
    from rdma_kv_cache.batch.lines import InputInfo, Request

TICK_S = 0.5
# Of the state file: those who watch it look every two seconds.
STATE_TICKS = 4


@dataclass(frozen=True)
class BatchOptions:
    """What to run. `url` is the server's with or without /v1; times are in seconds.

    `why_gone` returns a text once it is known that the server will not come back. `state_file`
    is kept up to date with how far the run is.
    """

    prompts: Path
    out: Path
    url: str
    api_key: str | None = field(default=None, repr=False)
    model: str | None = None
    concurrency: int = 32
    request_timeout_s: float = 600.0
    retry_deadline_s: float = 300.0
    drain_timeout_s: float = 10.0
    restart: bool = False
    why_gone: Callable[[], str] = str
    state_file: Path | None = None

    @property
    def base_url(self) -> str:
        """The server's URL without /v1."""
        return self.url.rstrip("/").removesuffix("/v1")


@dataclass(frozen=True)
class BatchResult:
    """How the run ended. `stopped` is empty when the output file is complete."""

    total: int
    done_before: int
    ok: int
    failed: int
    retryable: int
    figures: list[tuple[str, str]]
    stopped: str = ""
    signal: int = 0

    def rows(self) -> list[tuple[str, str]]:
        """Return (label, figure) lines for the summary."""
        earlier = f", {self.done_before} from an earlier run" if self.done_before else ""
        requests = f"{self.ok} ok, {self.failed} failed, of {self.total}{earlier}"
        return [("Requests", requests), *self.figures]


async def run_batch(options: BatchOptions, info: InputInfo, console: Console) -> BatchResult:
    """Run the lines of `options.prompts` that have no result yet; `info` comes from `scan`.

    Raises BatchError if the run cannot start. SIGINT and SIGTERM stop it within
    `drain_timeout_s`; what is done is kept.
    """
    async with _session(options) as session:
        client = Client(
            session,
            options.base_url,
            request_timeout_s=options.request_timeout_s,
            retry_deadline_s=options.retry_deadline_s,
            why_gone=options.why_gone,
        )
        fingerprint = Fingerprint(info.sha256, options.model or await client.served_model())
        progress = Progress(progress_path(options.out), fingerprint, restart=options.restart)
        try:
            run = _Run(options, console, progress, client)
            before = await kv_metrics.fetch(session, options.base_url)
            await run.execute_and_write(info.lines)
            kv = kv_metrics.KvFigures(before, await kv_metrics.fetch(session, options.base_url))
        finally:
            progress.close()
    return BatchResult(
        total=info.lines,
        done_before=progress.done_before,
        ok=progress.done - len(progress.failed),
        failed=len(progress.failed),
        retryable=len(progress.retryable),
        figures=[*run.tally.rows(), *kv.rows()],
        stopped=run.stopped,
        signal=run.stops.number if run.stopped else 0,
    )


@asynccontextmanager
async def _session(options: BatchOptions) -> AsyncIterator[aiohttp.ClientSession]:
    headers = {"Authorization": f"Bearer {options.api_key}"} if options.api_key else {}
    # One more than the requests in flight, so that /metrics never waits behind them.
    connector = aiohttp.TCPConnector(limit=options.concurrency + 1)
    async with aiohttp.ClientSession(connector=connector, headers=headers) as session:
        yield session


class _Run:
    """The workers of one run. They share one iterator, so reading keeps pace with answers."""

    def __init__(
        self, options: BatchOptions, console: Console, progress: Progress, client: Client
    ) -> None:
        self.tally = Tally()
        self.stopped = ""
        self.stops = StopSignals(self._say_stopping)
        self._options = options
        self._console = console
        self._progress = progress
        self._client = client
        self._items = read_requests(options.prompts)

    async def execute_and_write(self, total: int) -> None:
        """Execute, then write the output file if it is complete; a full disk stops the run."""
        progress = self._progress
        try:
            await self.execute(total)
            if not self.stopped:
                progress.write_output(self._options.out)
                if not progress.retryable:
                    progress.remove()
        except OSError as error:
            self.stopped = f"cannot write in {progress.path.parent}: {error.strerror}"

    async def execute(self, total: int) -> None:
        """Run until all `total` lines have a result, a signal comes or the server is gone."""
        progress = self._progress
        if progress.dropped_bytes:
            self._say(f"Ignored {progress.dropped_bytes} bytes of a line that a kill cut off.")
        if progress.done_before:
            self._say(f"Continuing: {progress.done_before} of {total} lines are done.")
        with Display(self._console, total) as display, self.stops as stops:
            ticker = asyncio.create_task(self._tick(display, total))
            try:
                await stops.guard(
                    asyncio.create_task(self._work_all()), self._options.drain_timeout_s
                )
            except ServerGoneError as error:
                self.stopped = str(error)
            finally:
                ticker.cancel()
                await asyncio.gather(ticker, return_exceptions=True)
                self.tally.wall_s = self.tally.elapsed_s()
                display.update(progress.done, self.tally, last=True)
                self._write_state(total)
                progress.sync()
        if progress.done < total and not self.stopped:
            self.stopped = f"stopped by {signal.Signals(stops.number).name}"

    async def _work_all(self) -> None:
        workers = [asyncio.create_task(self._work()) for _ in range(self._options.concurrency)]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)

    async def _work(self) -> None:
        while not self.stops.stop.is_set():
            item = next(self._items, None)
            if item is None:
                return
            if not self._progress.pending(item.line):
                # A long stretch of done lines must not hold up signals.
                await asyncio.sleep(0)
            elif isinstance(item, Rejected):
                self._record_rejected(item)
                await asyncio.sleep(0)
            else:
                self._record(item, await self._client.post(self._with_model(item)))

    def _with_model(self, request: Request) -> Request:
        model = {"model": self._options.model}
        return replace(request, body={**request.body, **model}) if model["model"] else request

    def _record_rejected(self, item: Rejected) -> None:
        error = {"code": item.code, "message": item.message, "line": item.line}
        self.tally.add(None, ok=False)
        self._progress.append(
            item.line, _output_line(item.custom_id, None, error), ok=False, retryable=False
        )

    def _record(self, request: Request, outcome: Outcome) -> None:
        response = error = None
        if outcome.status is None:
            error = {"code": "no_answer", "message": outcome.error, "line": request.line}
        else:
            response = {
                "status_code": outcome.status,
                "request_id": outcome.request_id,
                "body": outcome.body,
            }
        self.tally.add(outcome.body, ok=outcome.ok)
        self._progress.append(
            request.line,
            _output_line(request.custom_id, response, error),
            ok=outcome.ok,
            retryable=outcome.retryable,
        )

    async def _tick(self, display: Display, total: int) -> None:
        for tick in itertools.count():
            display.update(self._progress.done, self.tally)
            if tick % STATE_TICKS == 0:
                await asyncio.to_thread(self._write_state, total)
            await asyncio.to_thread(self._progress.sync)
            await asyncio.sleep(TICK_S)

    def _write_state(self, total: int) -> None:
        progress, path = self._progress, self._options.state_file
        if path is None:
            return
        failed = len(progress.failed)
        write_state(
            path,
            BatchState(
                total=total,
                answered=progress.done - failed,
                failed=failed,
                done_before=progress.done_before,
                seconds=round(self.tally.elapsed_s(), 3),
            ),
        )

    def _say_stopping(self, name: str) -> None:
        self._say(
            f"{name}: no new requests; waiting up to {self._options.drain_timeout_s:g} s for those "
            "in flight (again to abandon them)."
        )

    def _say(self, text: str) -> None:
        self._console.print(text, soft_wrap=True, highlight=False, markup=False)


def _output_line(
    custom_id: str | None, response: dict[str, Any] | None, error: dict[str, Any] | None
) -> dict[str, Any]:
    return {
        "id": f"batch_req_{uuid.uuid4().hex}",
        "custom_id": custom_id,
        "response": response,
        "error": error,
    }
