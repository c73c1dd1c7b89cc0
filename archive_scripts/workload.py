"""What the workers of a server are doing, and waiting until they do nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path

from archive_scripts.errors import CommandError
from archive_scripts.gauges import gauges
from archive_scripts.management import Version, Worker
from archive_scripts.run_folder import RunFolder

IN_FLIGHT = "musicgen_requests_in_flight"
WAITING = "musicgen_queue_depth"

# A request that the server has just taken is counted once its worker has seen it.
SETTLE_SECONDS = 1.0
POLL_SECONDS = 0.2

ESTABLISHED = "01"  # in /proc/net/tcp


class Workload:
    """The gauges of a server's workers, as they are now.

    Raises:
        CommandError: the server does not answer.
    """

    def __init__(self, server: RunFolder) -> None:
        self._values = gauges(server)

    def of(self, metric: str, workers: Iterable[Worker]) -> int:
        """The sum of a gauge over workers; a worker that has reported nothing yet has done nothing yet."""
        return int(sum(self._values.get((metric, worker.pid), 0.0) for worker in workers))

    def of_worker(self, worker: Worker) -> dict[str, int]:
        """How busy one worker is."""
        return {"in_flight": self.of(IN_FLIGHT, [worker]), "waiting": self.of(WAITING, [worker])}

    def in_flight(self, versions: Iterable[Version]) -> int:
        """Requests that came to these versions and whose replies have not gone out."""
        return sum(self.of(IN_FLIGHT, version.workers) + version.pending for version in versions)


def wait_until_idle(count: Callable[[], int], seconds: float) -> int:
    """Return when a count has been 0 for a little while, or the time is up: then with the count."""
    deadline = time.monotonic() + seconds
    idle_since = None
    while True:
        now = time.monotonic()
        left = count()
        idle_since = None if left else idle_since or now
        if idle_since is not None and now - idle_since >= SETTLE_SECONDS:
            return 0
        if left and now >= deadline:
            return left
        time.sleep(POLL_SECONDS)


def drain(count: Callable[[], int], seconds: float, force: bool) -> None:
    """Wait for accepted requests.

    Raises:
        CommandError: some are left when the time is up, unless `force` is set.
    """
    left = wait_until_idle(count, seconds)
    if left and not force:
        raise CommandError(
            f"{left} requests were not finished in {seconds:g} s, so nothing was changed; give them more time with "
            "--drain, or cut them with --force"
        )


def replies_unread(port: int) -> int:
    """Connections to a port of this machine whose replies their clients have not taken in whole; 0 where the system
    does not tell."""
    return sum(_unread(Path(f"/proc/net/{table}"), port) for table in ("tcp", "tcp6"))


def _unread(table: Path, port: int) -> int:
    try:
        lines = table.read_text().splitlines()[1:]
    except OSError:
        return 0
    count = 0
    for line in lines:
        _, local, _, state, queues, *_ = line.split()
        sent, _, _ = queues.partition(":")
        count += state == ESTABLISHED and int(local.rpartition(":")[2], 16) == port and int(sent, 16) > 0
    return count
