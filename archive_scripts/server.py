"""A TorchServe of our own: a private folder, its own session of processes, and an end that leaves nothing
running."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

import psutil

from archive_scripts.client import generate
from archive_scripts.errors import CommandError
from archive_scripts.loading import load_error, set_workers, wait_until_ready
from archive_scripts.machine import find_java_home, free_port, is_loopback, is_taken, server_environment, size
from archive_scripts.management import Management, Version
from archive_scripts.members import model_name
from archive_scripts.properties import read_properties
from archive_scripts.run_folder import CONFIG_FILE, CONSOLE, RunFolder, Scope
from archive_scripts.workload import Workload, replies_unread, wait_until_idle
from handler.drain import SERVER

CONFIG = Path(__file__).resolve().parents[1] / "config.properties"
LOG_CONFIG = Path(__file__).with_name("log4j2.xml")
POLL_SECONDS = 0.2
JVM_STOP_SECONDS = 30

# In this order the three servers take the port given and the two after it.
ADDRESSES = ("inference_address", "management_address", "metrics_address")
GRPC_ADDRESSES = ("grpc_inference_address", "grpc_management_address")


class TorchServe:
    """Serves archives until it is left as a context manager.

    Everything it writes is in `folder`, readable by this user alone (see `RunFolder`). The folder goes when the server
    stops, unless the server failed.

    Args:
        archives: `.mar` files, and folders of unpacked ones.
        port: of inference; management and metrics take the next two.
        open_profile: no tokens. For trials on this machine; refused when an address is not loopback.
        config: TorchServe properties to derive from.
        environment: variables that its workers get besides this process's own.
        gpus: how many it hands to workers, in turn; None: all it finds.

    Raises:
        CommandError: a port is taken, no Java can be found, the disk is too small for the unpacked archives, or
            the open profile meets a public address.
    """

    def __init__(
        self,
        archives: Sequence[Path],
        port: int,
        open_profile: bool = False,
        config: Path = CONFIG,
        environment: Mapping[str, str] | None = None,
        gpus: int | None = None,
    ) -> None:
        self._properties = read_properties(config)
        if metrics := self._properties.get("metrics_config"):
            self._properties["metrics_config"] = str((config.parent / metrics).resolve())
        if gpus is not None:
            self._properties["number_of_gpu"] = str(gpus)
        if open_profile:
            self._properties["disable_token_authorization"] = "true"
        addresses = [urlsplit(self._properties.get(key, "http://127.0.0.1")) for key in ADDRESSES]
        if any(address.scheme != "http" for address in addresses):
            raise CommandError(f"the addresses in {config} must begin with http://; for TLS put a proxy in front")
        hosts = [address.hostname or "" for address in addresses]
        grpc = [self._properties.get(key, "127.0.0.1") for key in GRPC_ADDRESSES]
        if open_profile and not all(is_loopback(host) for host in [*hosts, *grpc]):
            raise CommandError(f"--open serves without tokens, so the addresses in {config} must be loopback ones")
        self._urls = {
            key: f"http://[{host}]:{port + offset}" if ":" in host else f"http://{host}:{port + offset}"
            for offset, (key, host) in enumerate(zip(ADDRESSES, hosts, strict=True))
        }
        for offset, host in enumerate(hosts):
            if is_taken(host, port + offset):
                raise CommandError(
                    f"port {port + offset} is taken; choose another with --port (that one and the next two are used)"
                )
        # Folders are linked to, and nothing of them is copied.
        needed = sum(archive.stat().st_size for archive in archives if archive.is_file())
        free = shutil.disk_usage(tempfile.gettempdir()).free
        if free < needed:
            raise CommandError(
                f"TorchServe unpacks the archives, {size(needed)}, and {tempfile.gettempdir()} has {size(free)} free; "
                "set TMPDIR to a folder on a larger disk"
            )
        self._archives = archives
        self._environment = server_environment(find_java_home()) | dict(environment or {})

    @property
    def url(self) -> str:
        """Where requests go, such as `http://127.0.0.1:8080`."""
        return self._urls["inference_address"]

    def __enter__(self) -> TorchServe:
        self.running = RunFolder.create(self._derived())
        self.folder = self.running.path
        try:
            links = {model_name(archive): self.running.link(archive) for archive in self._archives}
        except CommandError:
            shutil.rmtree(self.folder)
            raise
        self._environment |= {
            "TMPDIR": str(self.folder / "tmp"),
            "TEMP": str(self.folder / "tmp"),
            "LOG_LOCATION": str(self.folder / "logs"),
            "METRICS_LOCATION": str(self.folder / "logs"),
        }
        command = [
            sys.executable,
            "-m",
            "ts.model_server",
            "--start",
            "--foreground",
            "--no-config-snapshots",
            "--ts-config",
            CONFIG_FILE,
            "--log-config",
            str(LOG_CONFIG),
            "--models",
            *(f"{model}={link}" for model, link in links.items()),
        ]
        # A session of its own: Ctrl-C in the terminal reaches this process alone, which then stops the server
        # in order.
        with (self.folder / CONSOLE).open("wb") as console:
            self._launcher = subprocess.Popen(
                command,
                cwd=self.folder,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with _uninterrupted():
            self._stop()
        failed = isinstance(error, Exception)
        shutil.rmtree(self.folder / "tmp" if failed else self.folder, ignore_errors=True)

    def wait_until_loaded(self, model: str, seconds: float, workers: int | None = None) -> None:
        """Return when the model has so many workers, or as many as its archive asks for, all of them ready.

        Raises:
            CommandError: the server died, the model cannot be loaded, or the time is up; with the end of the
                log.
        """

        def error() -> str | None:
            if self._launcher.poll() is not None:
                raise CommandError(f"TorchServe ended while starting.\n{self.running.log_tail()}")
            return load_error(self.running.log())

        def get() -> Version:
            return Management(self.running).version(model)

        loaded = wait_until_ready(self.running, get, None, seconds, error)
        if workers is not None and workers != len(loaded.workers):
            set_workers(self.running, loaded, workers, seconds)

    def generate(self, model: str, request: Mapping[str, Any], seconds: float) -> tuple[bytes, Mapping[str, str]]:
        """One prediction: the reply's body and headers.

        Raises:
            CommandError: the server's answer is an error, or none.
        """
        try:
            return generate(self.running, model, request, seconds)
        except CommandError as error:
            raise CommandError(f"{error}\n{self.running.log_tail()}") from error

    def authorization(self, scope: Scope) -> dict[str, str]:
        """The header that TorchServe asks for; none in the open profile."""
        return self.running.authorization(scope)

    def wait(self) -> None:
        """Return only by an exception: KeyboardInterrupt, or

        Raises:
            CommandError: the server died; with the end of the log.
        """
        while self._launcher.poll() is None:
            time.sleep(POLL_SECONDS)  # to wait without an end would miss a signal that comes as the wait begins
        raise CommandError(f"TorchServe ended by itself.\n{self.running.log_tail()}")

    def _derived(self) -> dict[str, str]:
        derived = self._properties | self._urls
        ports = ("grpc_inference_port", "grpc_management_port", "initial_worker_port")
        return derived | {port: str(free_port()) for port in ports}

    def drain(self, seconds: float) -> int:
        """Refuse what is new until the server stops, and return when what was accepted has been answered, its replies
        read by the clients; or when the time is up: then with how many are left. A server that does not answer for a
        while has as many left as it had, one at least.

        Raises:
            CommandError: the server is gone.
        """
        with contextlib.suppress(OSError):  # with a full disk it cannot be asked, and what comes is finished too
            self.running.ask_to_drain(SERVER)
        last = 1

        def left() -> int:
            nonlocal last
            try:
                versions = Management(self.running).all_versions()
                last = Workload(self.running).in_flight(versions) or replies_unread(self.running.port)
            except CommandError:
                if self._launcher.poll() is not None:
                    raise
                last = max(1, last)
            return last

        return wait_until_idle(left, seconds)

    def _stop(self) -> None:
        """End the JVM, which the launcher would leave running, then whatever is left of the session."""
        try:
            with contextlib.suppress(psutil.NoSuchProcess, subprocess.TimeoutExpired):
                for process in psutil.Process(self._launcher.pid).children():
                    process.terminate()
                self._launcher.wait(JVM_STOP_SECONDS)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._launcher.pid, signal.SIGKILL)
            self._launcher.wait()


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C does nothing: whoever is impatient would leave the server running."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    kept = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, kept)
