"""TorchServe's management API, as the commands use it."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Set
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlencode

from archive_scripts.errors import CommandError
from archive_scripts.gauges import gauges
from archive_scripts.run_folder import RunFolder

MOST_MODELS = 1000
SECONDS = 60.0
READY = "READY"
FAILED = "FAILED"


@dataclass(frozen=True, slots=True)
class Worker:
    """A process that serves a version: its pid, its status (`READY`, `LOADING`, or `FAILED`: it could not load the
    model, and answers every request with the cause), whether it has a GPU, and the cause of its failure."""

    pid: int
    status: str
    gpu: bool
    failure: str | None = None

    @property
    def is_ready(self) -> bool:
        return self.status == READY


@dataclass(frozen=True, slots=True)
class Version:
    """A version of a variant on the server.

    Attributes:
        variant, version: its names.
        is_default: requests that name no version go to it.
        archive: its file or folder in the server's store.
        workers: in the order in which they were started; scaling down ends the last ones.
        pending: requests that no worker has taken yet.
        failure: why a worker could not load the model; where there is no worker, why the last one could not.
    """

    variant: str
    version: str
    is_default: bool
    archive: str
    workers: tuple[Worker, ...]
    pending: int
    failure: str | None = None

    @property
    def ready(self) -> int:
        """How many of its workers are ready."""
        return sum(worker.is_ready for worker in self.workers)


class Management:
    """What a server's management API can do; every method raises CommandError with the server's own reason if it
    refuses, or if it does not answer."""

    def __init__(self, server: RunFolder) -> None:
        self._server = server

    def all_versions(self) -> list[Version]:
        models = self._call("GET", "", limit=MOST_MODELS)["models"]
        names = sorted({str(model["modelName"]) for model in models})
        return [version for name in names for version in self.versions(name)]

    def versions(self, variant: str) -> list[Version]:
        [default] = self._call("GET", f"/{quote(variant)}")
        described = self._call("GET", f"/{quote(variant)}/all")
        loaded = {pid for _, pid in gauges(self._server)}
        return [self._version(description, default["modelVersion"], loaded) for description in described]

    def version(self, variant: str, version: str | None = None) -> Version:
        """One version: the default one if none is named."""
        versions = self.versions(variant)
        for known in versions:
            if known.version == version or (version is None and known.is_default):
                return known
        there = ", ".join(known.version for known in versions)
        raise CommandError(f"{variant} has no version {version} on this server; it has {there}")

    def register(self, variant: str, archive: str) -> None:
        """Begins to load a version, by one worker; it is the default if it is the variant's first.

        Args:
            archive: its name in the server's store.
        """
        # Without waiting: TorchServe would not answer at all if the model cannot be loaded.
        self._call("POST", "", url=archive, model_name=variant, initial_workers=1, synchronous="false")

    def scale(self, variant: str, version: str, workers: int) -> None:
        """Begins to start workers, or ends the last ones with whatever they are doing, until there are so many."""
        options = {"min_worker": workers, "max_worker": workers, "synchronous": "false"}
        self._call("PUT", f"/{quote(variant)}/{quote(version)}", **options)

    def set_default(self, variant: str, version: str) -> None:
        self._call("PUT", f"/{quote(variant)}/{quote(version)}/set-default")

    def unregister(self, variant: str, version: str) -> None:
        """Its workers are ended with whatever they are doing."""
        self._call("DELETE", f"/{quote(variant)}/{quote(version)}")

    def _version(self, description: Any, default: str, loaded: Set[int]) -> Version:
        variant, version = description["modelName"], description["modelVersion"]
        failures = self._server.failures(variant, version)
        workers = []
        for told in description["workers"]:
            pid = told["pid"]
            status = FAILED if pid in failures else _status(told["status"], pid in loaded)
            workers.append(Worker(pid, status, told["gpu"], failures.get(pid)))
        causes = [worker.failure for worker in workers if worker.failure] if workers else list(failures.values())
        return Version(
            variant=variant,
            version=version,
            is_default=version == default,
            archive=description["modelUrl"],
            workers=tuple(workers),
            pending=description.get("jobQueueStatus", {}).get("pendingRequests", 0),
            failure=causes[-1] if causes else None,
        )

    def _call(self, method: str, path: str, **query: Any) -> Any:
        url = f"{self._server.management}/models{path}" + (f"?{urlencode(query)}" if query else "")
        try:
            headers = self._server.authorization("management")
            request = urllib.request.Request(url, method=method, headers=headers)
            with urllib.request.urlopen(request, timeout=SECONDS) as reply:
                return json.load(reply)
        except urllib.error.HTTPError as error:
            raise CommandError(f"the server refused: {_reason(error)}") from error
        except (OSError, ValueError) as error:
            logs = f"its logs are in {self._server.path}"
            raise CommandError(f"the server at {self._server.management} does not answer: {error} ({logs})") from error


def _status(told: str, is_loaded: bool) -> str:
    """TorchServe calls a worker that loads its model UNLOADING, and for ever so one that took the place of one that
    died, though that serves."""
    if told != "UNLOADING":
        return told
    return READY if is_loaded else "LOADING"


def _reason(error: urllib.error.HTTPError) -> str:
    body = error.read().decode(errors="replace")
    try:
        return str(json.loads(body)["message"])
    except (KeyError, TypeError, ValueError):
        return f"{error.code} {body}".strip()
