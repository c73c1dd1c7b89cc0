"""The worker's end of the pipe to the engine's process, for writing."""

from __future__ import annotations

import logging
from collections.abc import Callable
from multiprocessing.connection import Connection
from queue import SimpleQueue
from threading import Thread

logger = logging.getLogger(__name__)

Message = Callable[[], bytes | None]
"""Gives a message when its turn has come; None: it is no longer wanted."""


class Outbox:
    """Sends messages in the order they are put in, from a thread of its own: nobody waits for a job with much audio.

    Args:
        connection: to the process.
        failed: called when a message could not be sent: the process is gone, or of no more use.
    """

    def __init__(self, connection: Connection, failed: Callable[[], object]) -> None:
        self._connection = connection
        self._failed = failed
        self._messages: SimpleQueue[Message | None] = SimpleQueue()
        Thread(target=self._send, name="outbox", daemon=True).start()

    def put(self, message: Message) -> None:
        """Takes a message; it is made when it is sent."""
        self._messages.put(message)

    def close(self) -> None:
        """Closes the connection, after what is on its way; nobody reads from it any more."""
        self._messages.put(None)

    def _send(self) -> None:
        while (message := self._messages.get()) is not None:
            content = None
            try:
                if (content := message()) is not None:
                    self._connection.send_bytes(content)
            except Exception as error:
                if not isinstance(error, OSError):
                    logger.exception("the engine cannot be told of a job")
                self._failed()
            del message, content  # or the last job's audio would stay
        self._connection.close()
