"""What the host is asked for: each call is carried out on its disk, as the other process would do it without a host."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from cowkit.cow_disk import CowDisk
from cowkit.errors import CowkitError, DiskClosedError, UsageError
from cowkit.host.hosted import Hosted
from cowkit.hosting.channel import Channel, Data, packed
from cowkit.hosting.errors_in_transit import dismantled
from cowkit.hosting.messages import Reply, Request
from cowkit.hosting.surroundings import Mirror


class Abandoned(CowkitError):
    """Nobody waits for the result any more."""


class Calls:
    """Answers calls; each channel's from a thread of its own."""

    def __init__(self) -> None:
        self._disks: dict[int, Hosted] = {}
        self._mirror = Mirror()
        self._ending = False

    def answer(self, channel: Channel) -> None:
        """Carry out one call.

        :raises OSError: the other end has gone.
        """
        try:
            request, data, descriptors = channel.receive_with_descriptors()
        except OSError:
            raise
        except Exception as error:  # an argument of a type that is known in the other process alone
            channel.send(packed((Reply.ERROR, dismantled(_not_understood(error)))))
            return
        directory = descriptors.pop() if request.located else -1
        given = [socket.socket(fileno=fd) for fd in descriptors]
        result: object = None
        back: Data = b""
        try:
            if request.surroundings is None:
                result, back = self._carry_out(channel, request, data, given)
            else:
                with self._mirror.of(request.surroundings, directory):
                    result, back = self._carry_out(channel, request, data, given)
            head = packed((Reply.RESULT, result))
        except BaseException as error:
            for each in given:
                each.close()
            back = b""
            head = packed((Reply.ERROR, dismantled(error)))
        finally:
            if directory >= 0:
                os.close(directory)
        channel.send(head, back)

    def _carry_out(
        self, channel: Channel, request: Request, data: bytearray, given: list[socket.socket]
    ) -> tuple[object, Data]:
        operation, number, arguments, options = request[:4]
        if operation == "open":
            return self._open(channel, number, *arguments, **options), b""
        if operation == "forget":
            self._forget(number)
            return None, b""
        gone = operation == "close" and not any(arguments)  # or its last state is asked for
        hosted = self._disks.pop(number, None) if gone else self._disks.get(number)
        if hosted is None:
            raise DiskClosedError("the disk is closed")
        if operation == "pread":
            return None, hosted.disk.pread(*arguments)
        if operation == "pwrite":
            hosted.disk.pwrite(data, *arguments)
            return None, b""
        if operation in ("diff", "changes"):
            options["progress"] = self._progress(channel, reports=request.reports)
        return hosted.carry_out(operation, arguments, options, given), b""

    def _open(
        self, channel: Channel, number: int, base: str | None, **options: Any
    ) -> tuple[int, int, str | None, str]:
        disk = CowDisk(base, **options)
        self._disks[number] = Hosted(disk)
        if channel.hung_up() or self._ending:
            self._forget(number)
        return disk.size, disk.block_size, disk.base, disk.name

    def _forget(self, number: int) -> None:
        hosted = self._disks.pop(number, None)
        if hosted is not None:
            hosted.forget()

    def _progress(self, channel: Channel, *, reports: bool) -> Callable[[int, int], None]:
        """What is called as the work goes on: whether the caller still waits, and how far it has got, if that is asked for."""

        def progress(done: int, total: int) -> None:
            if channel.hung_up():
                raise Abandoned("given up: the caller has gone")
            if reports:
                channel.send(packed((Reply.PROGRESS, (done, total))))
                go_on, _ = channel.receive()
                if not go_on:
                    raise Abandoned("given up: the caller was told enough")

        return progress

    def end(self) -> None:
        """Close all disks, at the same time: one whose base does not answer keeps no other."""
        self._ending = True
        threads = [
            threading.Thread(target=self._forget, args=(number,), name="cowkit-close", daemon=True)
            for number in list(self._disks)
        ]
        for thread in threads:
            with suppress(RuntimeError):  # no thread to be had: the process ends soon in any case
                thread.start()
        for thread in threads:
            with suppress(RuntimeError):
                thread.join()


def _not_understood(error: Exception) -> UsageError:
    refusal = UsageError(f"an argument cannot be understood by the host of the disk: {error}")
    refusal.__cause__ = error
    return refusal
