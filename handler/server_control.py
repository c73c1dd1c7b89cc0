"""The worker's way to the management API of the TorchServe that started it."""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote

import psutil

DEFAULT_ADDRESS = "http://127.0.0.1:8081"
LISTEN_SECONDS = 30.0
"""A server that starts loads its models first, and listens then."""
_PAUSE, _PATIENCE = 0.2, 5.0
# Whatever proxy the environment names, this machine is reached directly.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def stop_workers(variant: str, version: str) -> None:
    """Scale a version to no workers, this process included, which TorchServe then kills.

    From then on TorchServe itself answers all requests to this version, with a 503.

    Raises:
        OSError: the server cannot be found, does not answer, or refuses.
    """
    try:
        server = psutil.Process(os.getppid())
        folder, command = Path(server.cwd()), server.cmdline()
    except psutil.Error as error:
        raise OSError(f"the process that started this worker cannot be read: {error}") from error
    properties = _properties(folder, command)
    address = properties.get("management_address", DEFAULT_ADDRESS).rstrip("/")
    url = f"{address}/models/{quote(variant, safe='')}/{quote(version, safe='')}"
    request = urllib.request.Request(f"{url}?min_worker=0&max_worker=0&synchronous=false", method="PUT")
    key_file = folder / "key_file.json"
    if properties.get("disable_token_authorization") != "true" and key_file.is_file():
        request.add_header("Authorization", f"Bearer {json.loads(key_file.read_text())['management']['key']}")
    deadline = time.monotonic() + LISTEN_SECONDS
    while True:
        try:
            with _OPENER.open(request, timeout=_PATIENCE):
                return
        except urllib.error.HTTPError:
            raise
        except OSError:
            if time.monotonic() > deadline:
                raise
        time.sleep(_PAUSE)


def _properties(folder: Path, command: list[str]) -> Mapping[str, str]:
    """What the server was configured with, by `-f FILE` in its command line."""
    if "-f" not in command[:-1]:
        return {}
    lines = (folder / command[command.index("-f") + 1]).read_text().splitlines()
    pairs = (line.partition("=") for line in lines if "=" in line and not line.lstrip().startswith("#"))
    return {name.strip(): value.strip() for name, _, value in pairs}
