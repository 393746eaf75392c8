"""A QMP client for code without coroutines: the `qemu.qmp` package, whose event loop runs in a thread of its own.

A thread of its own, since the caller's may be running an event loop itself (a test that is a coroutine).
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import socket
import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any, Self, TypeVar

from cowkit.errors import MissingToolError, ToolError, with_pip

try:
    from qemu.qmp import EventListener, ExecuteError, QMPClient, QMPError
except ImportError as error:
    raise MissingToolError(
        "the Python package qemu.qmp", purpose="the engine qmp", remedy=with_pip("qemu.qmp")
    ) from error

TICK_SECONDS = 0.2
"""How often whoever follows the progress is asked whether to go on, while something is awaited."""

T = TypeVar("T")


class QmpError(ToolError):
    """The other end refuses a command, or has gone."""


class QmpSession:
    """A connection to a QMP server, made when a ``with`` block begins and ended with it.

    :param sock: connected to the server; the session's from now on.
    :param tick: called every now and then while a command or an event is awaited; what it raises ends the waiting.
    """

    def __init__(self, sock: socket.socket, tick: Callable[[], None]) -> None:
        self._socket = sock
        self._tick = tick
        self._client = QMPClient("cowkit")
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="cowkit-qmp", daemon=True)

    def __enter__(self) -> Self:
        try:
            self._thread.start()
            self._wait(self._client.connect(self._socket))
        except QMPError as error:
            self._end()
            raise QmpError(f"no QMP session: {error}") from error
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def execute(self, command: str, arguments: Mapping[str, object] | None = None) -> Any:
        """What the server answers.

        :raises QmpError: it refuses, in its words; or it has gone.
        """
        try:
            return self._wait(self._client.execute(command, arguments))
        except ExecuteError as error:
            raise QmpError(error.error.error.desc) from error
        except QMPError as error:
            raise QmpError(f"it ended the QMP session at {command}") from error

    @contextmanager
    def events(self, *names: str) -> Iterator[Callable[[], dict[str, Any]]]:
        """Listen to events of these names from now on; the value, called, waits for the next one and has its data.

        It raises QmpError when the server has gone.
        """
        listener = EventListener(names)
        self._client.register_listener(listener)

        def following() -> dict[str, Any]:
            data: dict[str, Any] = self._wait(self._next(listener))["data"]
            return data

        try:
            yield following
        finally:
            with suppress(QMPError):
                self._client.remove_listener(listener)

    async def _next(self, listener: EventListener) -> Any:
        """The next event; a listener itself waits on when the server has gone."""
        while listener.empty():
            if self._client.runstate.name != "RUNNING":
                raise QmpError("it ended the QMP session")
            with suppress(asyncio.TimeoutError):
                return await asyncio.wait_for(listener.get(), TICK_SECONDS)
        return await listener.get()

    def run_job(self, job: str, command: str, arguments: Mapping[str, object]) -> None:
        """Execute what begins the job of that name, and wait until it has ended.

        :raises QmpError: it failed, in the server's words.
        """
        with self.events("JOB_STATUS_CHANGE") as following:
            self.execute(command, arguments)
            while True:
                data = following()
                if data["id"] == job and data["status"] == "concluded":
                    break
        errors = [each["error"] for each in self.execute("query-jobs") if each["id"] == job and "error" in each]
        self.execute("job-dismiss", {"id": job})
        if errors:
            raise QmpError(errors[0])

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            while True:
                try:
                    return future.result(TICK_SECONDS)
                except concurrent.futures.TimeoutError:
                    if future.done():
                        raise
                    self._tick()
        except BaseException:
            future.cancel()
            raise

    def _end(self) -> None:
        if self._thread.is_alive():
            gone = asyncio.run_coroutine_threadsafe(self._disconnect(), self._loop)
            with suppress(concurrent.futures.CancelledError):
                gone.result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
        self._loop.close()
        self._socket.close()

    async def _disconnect(self) -> None:
        with suppress(QMPError, OSError, EOFError):
            await self._client.disconnect()
        # What was given up while it waited is to come to its end before the loop does.
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
