"""What the workers of a server report of themselves."""

from __future__ import annotations

import re
import urllib.request

from archive_scripts.errors import CommandError
from archive_scripts.run_folder import RunFolder

SAMPLE = re.compile(r'^(\w+)\{.*?Worker="(\d+)".*?\} (\S+)$', re.MULTILINE)


def gauges(server: RunFolder) -> dict[tuple[str, int], float]:
    """The values of a server's metrics as they are now, by name and pid of the worker. A worker reports once its model
    is loaded.

    Raises:
        CommandError: the server does not answer.
    """
    try:
        with urllib.request.urlopen(f"{server.metrics}/metrics", timeout=10) as reply:
            text = reply.read().decode()
    except OSError as error:
        logs = f"its logs are in {server.path}"
        raise CommandError(f"the server at {server.metrics} does not answer: {error} ({logs})") from error
    return {(name, int(worker)): float(value) for name, worker, value in SAMPLE.findall(text)}
