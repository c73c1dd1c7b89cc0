"""Waiting for models to load, and why they do not."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

from archive_scripts.errors import CommandError
from archive_scripts.management import Management, Version
from archive_scripts.run_folder import RunFolder

POLL_SECONDS = 0.2


def wait_until_ready(
    server: RunFolder,
    get: Callable[[], Version],
    workers: int | None,
    seconds: float,
    error: Callable[[], str | None] = lambda: None,
) -> Version:
    """Return when a version has as many workers as it should, all of them ready.

    Args:
        get: the version as it is now; raises CommandError while the server is not listening.
        workers: None: as many as it starts with.
        error: what ends the wait early, None while there is nothing.

    Raises:
        CommandError: there is an error, or the time is up.
    """
    deadline = time.monotonic() + seconds
    problem = ""
    while time.monotonic() < deadline:
        version = None
        try:
            version = get()
        except CommandError as refusal:
            problem = f" ({refusal})"
        # The log is read after the workers, or it might not tell yet of one that is seen to be gone.
        if found := error() or (version and version.failure):
            raise CommandError(f"TorchServe could not load its models: {found}\n(logs: {server.path})")
        if version is not None:
            wanted = len(version.workers) if workers is None else workers
            if version.ready == len(version.workers) == wanted:
                return version
            problem = f" ({version.ready} of {wanted} workers were)"
        time.sleep(POLL_SECONDS)
    raise CommandError(f"the model was not ready after {seconds:g} s{problem}\n{server.log_tail()}")


def set_workers(server: RunFolder, version: Version, workers: int, seconds: float) -> Version:
    """Start or end workers until a version has so many, and wait for them. TorchServe ends the last ones, with whatever
    they are doing.

    Raises:
        CommandError: one could not load the model, or the time is up.
    """
    management, since = Management(server), server.log_size()
    management.scale(version.variant, version.version, workers)

    def get() -> Version:
        return management.version(version.variant, version.version)

    if workers < len(version.workers):
        # Those that stay may be failed ones, and the log tells of workers that end as of those that fail.
        deadline = time.monotonic() + seconds
        while len((now := get()).workers) > workers:
            if time.monotonic() > deadline:
                raise CommandError(f"{len(now.workers)} workers were still there after {seconds:g} s")
            time.sleep(POLL_SECONDS)
        return now

    def error() -> str | None:
        return load_error(server.log(since), f"{version.variant}_{version.version}")

    return wait_until_ready(server, get, workers, seconds, error)


def load_error(log: str, worker_name: str | None = None) -> str | None:
    """What TorchServe's console log says of a failed load, None while there is none.

    TorchServe does not retry such a load until a request arrives, and never gives the reason over HTTP.

    Args:
        worker_name: `<variant>_<version>`, to look at its workers alone.
    """
    if found := re.search(r"Failed to load model: (.+)", log):
        return f"TorchServe cannot read {found.group(1)}"
    name = r"\S+?" if worker_name is None else re.escape(worker_name)
    # What the handler says of it, which stays to answer with the cause.
    if causes := re.findall(rf"W-\d+-{name}-std\w+ MODEL_LOG - .*cannot be served: (.*)", log):
        return str(causes[-1])
    # Its thread is named W-<number>-<variant>_<version>, and the loss of its connection is told with the number alone.
    numbers = set(re.findall(rf"\bW-(\d+)-{name}(?:-std\w+)? ", log))
    if not numbers & set(re.findall(r"(\d+) Worker disconnected", log)):
        return None
    # The worker's own lines, as `<time> [INFO ] <thread> MODEL_LOG - <line>`; the last traceback ends in the error.
    worker = "\n".join(re.findall(rf"W-\d+-{name}-std\w+ MODEL_LOG - (.*)", log))
    traceback = worker.rpartition("Traceback (most recent call last):\n")[2] if "Traceback" in worker else ""
    error = [line for line in traceback.splitlines() if line and not line.startswith(" ")]
    return "\n".join(error) or "its worker process died without a word; it may be out of memory"
