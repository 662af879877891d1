"""Following a job's log: the same progress display as a run of one's own, and a dropped connection is taken up again.

A log is read from its first character on every connection, so what was seen before is skipped by its length.
"""

from __future__ import annotations

import asyncio
import json
import math
import sys
import time
from datetime import UTC, datetime
from typing import Any

from rich.markup import escape
from rich.table import Table

from rayft import display
from rayft.jobs import ENDED, known

PULSE = 15.0  # seconds between two pings; a connection that answers none is given up
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 10.0  # seconds before it is made again
PATIENCE = 900.0  # seconds without an answer


class Reader:
    """A log's text as it comes, told to a display line by line."""

    def __init__(self, view: Any) -> None:
        self.view, self.rest, self.seen, self.skip = view, "", 0, 0

    def again(self) -> None:
        """The text comes from its start once more."""
        self.skip = self.seen

    def feed(self, text: str) -> None:
        fresh = text[self.skip :]
        self.skip = max(0, self.skip - len(text))
        self.seen += len(fresh)
        *lines, self.rest = (self.rest + fresh).split("\n")
        for line in lines:
            self.line(line)

    def close(self) -> None:
        if self.rest:
            self.line(self.rest)
        self.rest = ""

    def line(self, line: str) -> None:
        """A row or an event as the run tells it, or else what it printed."""
        try:
            told = json.loads(line) if line.startswith("{") else None
        except ValueError:
            told = None
        if isinstance(told, dict) and {"iteration", "iterations"} <= told.keys():
            row = {k: math.nan if v is None else v for k, v in told.items() if k != "iterations"}
            self.view.row(row, int(told["iterations"]))
        elif isinstance(told, dict) and told.keys() == {"event"}:
            self.view.event(str(told["event"]))
        else:
            told_to = sys.stderr if line.startswith(("rayft: ", "report: ", "saved; ")) else sys.stdout
            print(line, file=told_to, flush=True)


def follow(client: Any, name: str, quiet: bool = False) -> int:
    """Shows the job's log until its end; the exit code that a run of one's own would have."""
    view = display.choose(quiet)
    reader = Reader(view)
    try:
        asyncio.run(_until_the_end(client, name, reader))
    except KeyboardInterrupt:
        view.close()
        print(f"{name} goes on; come back with: rayft logs {name} --follow", file=sys.stderr)
        return 130
    finally:
        reader.close()
        view.close()
    return outcome(client, name)


def outcome(client: Any, name: str) -> int:
    """0 for a job that succeeded; else what became of it is said."""
    job = known(client, name)
    status = str(job.status)
    if status == "SUCCEEDED":
        return 0
    if status == "STOPPED" or job.driver_exit_code == 130:
        print(f"{name} was stopped; continue its run with --resume", file=sys.stderr)
        return 130
    if job.driver_exit_code is None and job.message:  # it never came to a log of its own
        print(" ".join(str(job.message).split())[-500:], file=sys.stderr)
    print(f"rayft: job {name} failed; its whole log: rayft logs {name}", file=sys.stderr)
    return 2


def table(one: Any, client: Any) -> Table:
    """A row for one job, or for every job of the cluster, the latest first."""
    found = [one] if one is not None else [job for job in client.list_jobs() if job.submission_id]
    shown = Table(title=f"jobs at {client._address}")
    for heading in ("job", "status", "started (UTC)", "took", "command"):
        shown.add_column(heading)
    for job in sorted(found, key=lambda job: -(job.start_time or 0)):
        start = datetime.fromtimestamp((job.start_time or 0) / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S")
        took = ((job.end_time or 1000 * time.time()) - (job.start_time or 0)) / 1000
        command = job.entrypoint.replace("python -m rayft.cli", "rayft")
        told = (job.submission_id, str(job.status).lower(), start, f"{took:.0f} s", command)
        shown.add_row(*(escape(text) for text in told))
    return shown


async def _until_the_end(client: Any, name: str, reader: Reader) -> None:
    pause, last, told = FIRST_PAUSE, time.monotonic(), False
    while True:
        before = reader.seen
        try:
            await _tail(client, name, reader)
            lost = ""
        except (OSError, RuntimeError, _client_error()) as error:
            lost = str(error) or type(error).__name__
        try:
            status = str(await asyncio.to_thread(client.get_job_status, name))
        except (OSError, RuntimeError) as error:
            lost, status = lost or str(error), ""
        if status in ENDED and not lost:
            return
        lost = lost or ("" if status in (*ENDED, "PENDING") else "closed")  # the head itself ends a log with its job
        if status or reader.seen > before:
            pause, last = FIRST_PAUSE, time.monotonic()
        told = told and reader.seen == before  # once until there is news again
        if lost and not told:
            reader.view.event("the connection to the cluster was lost; the job goes on, trying again")
            told = True
        if time.monotonic() - last > PATIENCE:
            raise ValueError(f"the cluster has not answered for {PATIENCE:g} s; come back with rayft logs {name}")
        await asyncio.sleep(pause)
        pause = min(LONGEST_PAUSE, 2 * pause)
        reader.again()


async def _tail(client: Any, name: str, reader: Reader) -> None:
    import aiohttp

    url = f"{client._address}/api/jobs/{name}/logs/tail"
    async with (
        aiohttp.ClientSession(headers=client._headers, cookies=client._cookies) as session,
        session.ws_connect(url, heartbeat=PULSE, ssl=client._ssl_context or True) as socket,
    ):
        async for message in socket:
            if message.type == aiohttp.WSMsgType.TEXT:
                reader.feed(message.data)
            elif message.type == aiohttp.WSMsgType.ERROR:
                raise RuntimeError(str(socket.exception()))
        if socket.close_code == aiohttp.WSCloseCode.ABNORMAL_CLOSURE:
            raise RuntimeError("closed")


def _client_error() -> type[Exception]:
    import aiohttp

    return aiohttp.ClientError
