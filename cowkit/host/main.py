"""The host process, from its start to its end.

The main thread waits for new channels and for the end of the process that it belongs to; each channel has a thread of its
own. When the other process has ended, all the disks are closed as they would be there, so that no socket's file stays.
"""

from __future__ import annotations

import os
import resource
import select
import signal
import socket
import threading

from cowkit.host.calls import Calls
from cowkit.hosting.channel import Channel
from cowkit.server import counting

_END_SECONDS = 5
"""How long closing may take. A file system that does not answer must not keep the process."""


def main(control: int, owner: int) -> None:
    """Serve the process ``owner`` until it ends, or ends us.

    :param control: a Unix socket by which channels come.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # Whoever ends everything, as systemd does, ends the owner, too, which may need its disks in order to end well.
        # A handler that does nothing, for what is ignored stays so in the programs that are started from here.
        signal.signal(number, lambda *_: None)
    _raise_limit()
    counting.allow()
    served: list[tuple[threading.Thread, Channel]] = []
    calls = Calls()
    channels = socket.socket(fileno=control)  # open until the process ends: that is how the owner learns of it
    channels.set_inheritable(False)
    poll = select.poll()
    poll.register(channels, select.POLLIN)
    _watch(owner, poll)
    while all(fd == control for fd, _ in poll.poll()):
        data, descriptors, _, _ = socket.recv_fds(channels, 1, 1, socket.MSG_CMSG_CLOEXEC)
        if not data:
            break
        for fd in descriptors:
            channel = Channel(socket.socket(fileno=fd))
            thread = threading.Thread(target=_serve, args=(calls, channel), name="cowkit-channel", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # no thread to be had, which the other end takes from this
                channel.close()
                continue
            served = [each for each in served if each[0].is_alive()]
            served.append((thread, channel))
    signal.setitimer(signal.ITIMER_REAL, _END_SECONDS)  # SIGALRM ends a process that does not handle it
    for _, channel in served:
        channel.shut()
    calls.end()
    for thread, _ in served:
        thread.join()
    counting.wait_for_ended()
    os._exit(0)  # nothing is left to do for finalizers


def _raise_limit() -> None:
    """A thousand disks have more descriptors than a process may have by default."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _watch(owner: int, poll: select.poll) -> None:
    """Have ``poll`` tell when the owner has ended: a child of its may have a copy of the socket, and outlive it."""
    try:
        poll.register(os.pidfd_open(owner), select.POLLIN)
    except OSError:
        return  # it has ended already, or the system has no pidfd to give: the end of the socket tells, too
    if os.getppid() != owner:
        os._exit(0)


def _serve(calls: Calls, channel: Channel) -> None:
    try:
        while True:
            calls.answer(channel)
    except OSError:
        pass  # the other end has gone
    finally:
        channel.close()
