"""The private folder of a server: where it listens, its tokens, and the store it takes archives from.

    config.properties   what TorchServe was started with
    key_file.json       the access tokens, written by TorchServe
    store/              links to the archives, `<model>@<version>.mar`: all that can be registered
    tmp/                TorchServe's temporary files: unpacked archives, sockets; `draining/` and `failed/` (see
                        handler/drain.py and load_failure.py)
    logs/               as archive_scripts/log4j2.xml says
    console.log         what the Java machine itself prints

The folder is the working folder of the server's processes, by which a command finds the servers of this machine.
"""

from __future__ import annotations

import json
import os
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import psutil

from archive_scripts.errors import CommandError
from archive_scripts.members import MANIFEST, model_name, open_archive
from archive_scripts.properties import read_properties, write_properties
from handler.drain import FOLDER as DRAINING
from handler.load_failure import FOLDER as FAILED
from handler.load_failure import failures

PREFIX = "musicgen-"
CONFIG_FILE = "config.properties"
CONSOLE = "console.log"
LOG = "logs/server.log"
LOG_TAIL_LINES = 25
KEY_FILE = "key_file.json"
RENEW_BEFORE = timedelta(minutes=1)

Scope = Literal["inference", "management"]


class RunFolder:
    """A server's folder, its configuration written.

    Attributes:
        path: of the folder; readable by its owner alone.
        inference, management, metrics: where the server listens, as `http://127.0.0.1:8080`.
        is_open: it asks for no tokens.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        properties = read_properties(path / CONFIG_FILE)
        self.inference = properties["inference_address"]
        self.management = properties["management_address"]
        self.metrics = properties["metrics_address"]
        self.is_open = properties.get("disable_token_authorization") == "true"

    @classmethod
    def create(cls, properties: dict[str, str]) -> RunFolder:
        """A new folder, readable by this user alone, for a server of this configuration."""
        path = Path(tempfile.mkdtemp(prefix=PREFIX))  # mode 0700
        for name in ("store", "tmp"):
            (path / name).mkdir()
        for name in (DRAINING, FAILED):
            (path / "tmp" / name).mkdir()
        write_properties(path / CONFIG_FILE, properties | {"model_store": str(path / "store")})
        return cls(path)

    @property
    def port(self) -> int:
        """Where requests go."""
        return urlsplit(self.inference).port or 80

    def log(self, since: int = 0) -> str:
        """The server's log, from so many bytes on."""
        try:
            with (self.path / LOG).open("rb") as file:
                file.seek(since)
                return file.read().decode(errors="replace")
        except FileNotFoundError:
            return ""

    def log_size(self) -> int:
        return (self.path / LOG).stat().st_size

    def log_tail(self) -> str:
        """The last lines of what the server has printed and logged, and where the rest is."""
        lines = [
            line
            for text in ((self.path / CONSOLE).read_text(errors="replace"), self.log())
            for line in text.splitlines()
        ]
        return "\n".join([*lines[-LOG_TAIL_LINES:], f"(logs: {self.path})"])

    def link(self, archive: Path) -> str:
        """Put an archive into the store: a link, of which the name is given.

        Raises:
            CommandError: it is no archive.
        """
        name = f"{model_name(archive)}@{archive_version(archive)}" + ("" if archive.is_dir() else ".mar")
        link = self.path / "store" / name
        link.unlink(missing_ok=True)
        link.symlink_to(archive.resolve())
        return name

    def unlink(self, name: str) -> None:
        (self.path / "store" / name).unlink(missing_ok=True)

    def failures(self, variant: str, version: str) -> dict[int, str]:
        """Why workers of a version could not load their model, by pid, the latest last."""
        return failures(self.path / "tmp", variant, version)

    def token(self, scope: Scope, renew: bool = False) -> str:
        """The token of a scope; a new one, for which the old is no longer good, if it has expired or `renew` is set.

        Raises:
            OSError: the server has not written its tokens yet, or does not answer.
        """
        file = self.path / KEY_FILE
        keys = json.loads(file.read_text())
        if renew or _expires(keys[scope]) - datetime.now(UTC) < RENEW_BEFORE:
            request = urllib.request.Request(
                f"{self.management}/token?type={scope}", headers=bearer(keys["API"]["key"])
            )
            with urllib.request.urlopen(request, timeout=30):
                keys = json.loads(file.read_text())
        return str(keys[scope]["key"])

    def authorization(self, scope: Scope) -> dict[str, str]:
        """The header that the server asks for; none if it is open."""
        return {} if self.is_open else bearer(self.token(scope))

    def ask_to_drain(self, name: str) -> Path:
        """Have workers refuse what is new from now on: a name of handler/drain.py. Gives the file that says so."""
        file = self.path / "tmp" / DRAINING / name
        file.touch()
        return file

    @contextmanager
    def draining(self, *names: str) -> Iterator[None]:
        """Has workers refuse what is new for as long as the context lasts."""
        files = [self.ask_to_drain(name) for name in names]
        try:
            yield
        finally:
            for file in files:
                file.unlink(missing_ok=True)


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def archive_version(archive: Path) -> str:
    """The version an archive says it is.

    Raises:
        CommandError: it is no archive.
    """
    with open_archive(archive) as held:
        try:
            return str(json.loads(held.read_text(MANIFEST))["model"]["modelVersion"])
        except (KeyError, TypeError, ValueError) as error:
            raise CommandError(f"{archive}: its {MANIFEST} names no version; pack it again") from error


def find_server(port: int | None) -> RunFolder:
    """The folder of the server that this user runs on this machine.

    Args:
        port: of its requests; may be None where only one server runs.

    Raises:
        CommandError: there is none, or more than one.
    """
    servers = sorted(_running_servers(), key=lambda server: server.port)
    chosen = [server for server in servers if port in (None, server.port)]
    if len(chosen) == 1:
        return chosen[0]
    running = ", ".join(str(server.port) for server in servers)
    if chosen:
        raise CommandError(f"several servers of yours run here, at the ports {running}; choose one with --port")
    if servers:
        raise CommandError(f"no server of yours runs here at port {port}; there are others, at {running}")
    raise CommandError("no server of yours runs on this machine; start one: python -m archive_scripts serve VARIANT")


def _running_servers() -> list[RunFolder]:
    folders = set()
    for process in psutil.process_iter():
        # Processes of others, and those that end meanwhile.
        with suppress(psutil.Error, OSError):
            if process.uids().real == os.getuid():
                folder = Path(process.cwd())
                if folder.name.startswith(PREFIX) and (folder / CONFIG_FILE).is_file():
                    folders.add(folder)
    return [RunFolder(folder) for folder in folders]


def _expires(key: Any) -> datetime:
    # To the second: Python reads six digits of the nine that follow.
    return datetime.fromisoformat(key["expiration time"][:19]).replace(tzinfo=UTC)
