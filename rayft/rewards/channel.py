"""Messages between a supervisor, the zygote and its child, over sockets that a reward may scribble on.

message = token | running number | length | checksum | pickle
"""

from __future__ import annotations

import os
import pickle
import socket
import struct
import zlib
from typing import Any

FORK, KILL = b"f", b"k"  # what the zygote is asked for; with FORK comes a socket for the child
SOCKET_LOST = 113  # exit code of a child whose reward closed the socket
BLOCK = 1 << 18  # bytes read at once
HEADER = struct.Struct("<16sIQI")


class GarbledError(Exception):
    """There was something in the socket that no Channel has sent."""


class Channel:
    """Pickled messages over a stream socket, each with a token, a running number and a checksum.

    A reward may write into any file descriptor: what it writes into this one is noticed, and never taken for a score.
    """

    def __init__(self, sock: socket.socket, token: bytes) -> None:
        self.sock, self.token, self.pid = sock, token, os.getpid()
        self.sent = self.received = 0
        self.buffer = bytearray()

    def header(self, message: bytes) -> bytes:
        """What goes before a message."""
        self.sent += 1
        return HEADER.pack(self.token, self.sent, len(message), zlib.crc32(message))

    def send(self, said: Any) -> None:
        """Waits until all of it is on its way. A fork that a reward has made ends here instead."""
        if os.getpid() != self.pid:
            os._exit(0)
        message = pickle.dumps(said, pickle.HIGHEST_PROTOCOL)
        self.sock.sendall(self.header(message) + message)

    def receive(self) -> bytes:
        """The next message, still pickled; ``EOFError`` when the other side is gone."""
        while (message := self.next()) is None:
            block = self.sock.recv(BLOCK)
            if not block:
                raise EOFError
            self.buffer += block
        return message

    def next(self) -> bytes | None:
        """The next whole message among the bytes that have come."""
        if len(self.buffer) < HEADER.size:
            return None
        token, number, length, checksum = HEADER.unpack_from(self.buffer)
        if token != self.token or number != self.received + 1:
            raise GarbledError
        if len(self.buffer) < HEADER.size + length:
            return None
        message = bytes(memoryview(self.buffer)[HEADER.size : HEADER.size + length])
        if zlib.crc32(message) != checksum:
            raise GarbledError
        del self.buffer[: HEADER.size + length]
        self.received = number
        return message
