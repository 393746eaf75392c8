"""Where a disk is: in this process, or in the host, for which something stands here.

Design note. Threads of one Python process take turns: a test that computes holds up every request of a server beside it
for the interpreter's switch interval, 5 ms. So ``CowDisk(server="process")`` has its engine and its servers in another
process, the *host*: one for each process that asks for it (and so one for each worker of pytest-xdist), shared by all its
disks, started at the first need. What it runs is in the room ``host``, which is above ``cow_disk``: there, each disk is a CowDisk
like any other. This room is below.

What holds:

- The host ends when the process ends that started it, however that comes about, and with it everything of its disks. It
  learns so from the end of its control socket, and from a pidfd where a child has a copy of that socket.
- Calls are messages over Unix socket pairs (channel.py). A call has a channel to itself while it lasts, and a thread of
  the host at its other end: calls of several threads go on beside each other, and none here waits for another thread.
- A call that is given up (by an exception from outside, such as ctrl-C) takes its channel with it: nobody reads an answer
  that was another's.
- A forked child shares no channel with its parent.
"""
