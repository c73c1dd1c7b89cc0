"""The worker's end of the pipe to the engine's process, for writing."""

from __future__ import annotations

import contextlib
from multiprocessing.connection import Connection
from queue import SimpleQueue
from threading import Thread

from handler.engine.messages import packed


class Outbox:
    """Sends messages in the order they are put in, from a thread of its own: nobody waits for a job with much audio.

    What is put in after the pipe broke goes nowhere.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._messages: SimpleQueue[bytes | None] = SimpleQueue()
        Thread(target=self._send, name="outbox", daemon=True).start()

    def put(self, message: object) -> None:
        """Takes a message, or bytes that are `packed` already."""
        self._messages.put(message if isinstance(message, bytes) else packed(message))

    def close(self) -> None:
        """Closes the connection, after what is on its way; nobody reads from it any more."""
        self._messages.put(None)

    def _send(self) -> None:
        while (message := self._messages.get()) is not None:
            with contextlib.suppress(OSError, ValueError):
                self._connection.send_bytes(message)
        self._connection.close()
