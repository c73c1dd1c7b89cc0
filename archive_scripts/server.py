"""A TorchServe of our own: a private folder, its own session of processes, and an end that leaves nothing
running."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

import psutil

from archive_scripts.errors import CommandError
from archive_scripts.machine import find_java_home, free_port, is_loopback, is_taken, server_environment, size

CONFIG = Path(__file__).resolve().parents[1] / "config.properties"
JVM_STOP_SECONDS = 30
LOG_TAIL_LINES = 25

# In this order the three servers take the port given and the two after it.
ADDRESSES = ("inference_address", "management_address", "metrics_address")


class TorchServe:
    """Serves archives until it is left as a context manager.

    Everything it writes is in `folder`, readable by this user alone: `config.properties`, `key_file.json`
    (the access tokens), `logs/`, and TorchServe's temporary files, the unpacked archives and sockets among
    them. The folder goes when the server stops, unless the server failed.

    Args:
        archives: `.mar` files, and folders of unpacked ones, in one folder: the model store.
        port: of inference; management and metrics take the next two.
        open_profile: no tokens. For trials on this machine; refused when an address is not loopback.
        config: TorchServe properties to derive from.

    Raises:
        CommandError: a port is taken, no Java can be found, the disk is too small for the unpacked archives, or
            the open profile meets a public address.
    """

    def __init__(self, archives: Sequence[Path], port: int, open_profile: bool = False, config: Path = CONFIG) -> None:
        self._properties = read_properties(config)
        if metrics := self._properties.get("metrics_config"):
            self._properties["metrics_config"] = str((config.parent / metrics).resolve())
        self._open = open_profile
        hosts = [urlsplit(self._properties.get(key, "http://127.0.0.1")).hostname or "" for key in ADDRESSES]
        if open_profile and not all(is_loopback(host) for host in hosts):
            raise CommandError(f"--open serves without tokens, so the addresses in {config} must be loopback ones")
        self._urls = {
            key: f"http://{host}:{port + offset}"
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
        self._environment = server_environment(find_java_home())

    @property
    def url(self) -> str:
        """Where requests go, such as `http://127.0.0.1:8080`."""
        return self._urls["inference_address"]

    def __enter__(self) -> TorchServe:
        self.folder = Path(tempfile.mkdtemp(prefix="musicgen-"))  # mode 0700
        (self.folder / "tmp").mkdir()
        write_properties(self.folder / "config.properties", self._derived())
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
        ]
        command += ["--ts-config", "config.properties"]
        # A session of its own: Ctrl-C in the terminal reaches this process alone, which then stops the server
        # in order.
        with (self.folder / "console.log").open("wb") as console:
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
        self._stop()
        failed = isinstance(error, Exception)
        shutil.rmtree(self.folder / "tmp" if failed else self.folder, ignore_errors=True)

    def wait_until_loaded(self, model: str, seconds: float) -> None:
        """Return when a worker of the model is ready.

        Raises:
            CommandError: the server died, the model cannot be loaded, or the time is up; with the end of the
                log.
        """
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self._launcher.poll() is not None:
                raise CommandError(f"TorchServe ended while starting.\n{self._log_tail()}")
            if error := load_error(self._log()):
                raise CommandError(f"TorchServe could not load its models: {error}\n(logs: {self.folder})")
            if self._is_ready(model):
                return
            time.sleep(0.2)
        raise CommandError(f"the model {model} was not ready after {seconds:g} s.\n{self._log_tail()}")

    def generate(self, model: str, request: Mapping[str, Any], seconds: float) -> tuple[bytes, Mapping[str, str]]:
        """One prediction: the reply's body and headers.

        Raises:
            CommandError: the server's answer is an error, or none.
        """
        body = json.dumps(request).encode()
        headers = {"Content-Type": "application/json"} | self.authorization("inference")
        url = f"{self.url}/predictions/{model}"
        try:
            with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=seconds) as reply:
                return reply.read(), dict(reply.headers)
        except urllib.error.HTTPError as error:
            answer = error.read().decode(errors="replace")
            if error.code == 503 and (cause := unavailable(answer)):
                raise CommandError(f"{model} cannot be served: {cause}\n(logs: {self.folder})") from error
            raise CommandError(f"{url} answered {error.code}: {answer}\n{self._log_tail()}") from error
        except OSError as error:
            raise CommandError(f"{url} did not answer: {error}\n{self._log_tail()}") from error

    def authorization(self, scope: str) -> dict[str, str]:
        """The header that TorchServe asks for: scope `inference` or `management`; none in the open
        profile."""
        if self._open:
            return {}
        keys = json.loads((self.folder / "key_file.json").read_text())
        return {"Authorization": f"Bearer {keys[scope]['key']}"}

    def wait(self) -> None:
        """Return only by an exception: KeyboardInterrupt, or

        Raises:
            CommandError: the server died; with the end of the log.
        """
        self._launcher.wait()
        raise CommandError(f"TorchServe ended by itself.\n{self._log_tail()}")

    def _derived(self) -> dict[str, str]:
        derived = self._properties | self._urls
        derived |= {
            "model_store": str(self._archives[0].parent.resolve()),
            "load_models": ",".join(archive.name for archive in self._archives),
            "grpc_inference_port": str(free_port()),
            "grpc_management_port": str(free_port()),
            "initial_worker_port": str(free_port()),
        }
        if self._open:
            derived["disable_token_authorization"] = "true"
        return derived

    def _is_ready(self, model: str) -> bool:
        url = f"{self._urls['management_address']}/models/{model}"
        try:
            headers = self.authorization("management")
            with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=5) as reply:
                versions = json.load(reply)
        except (OSError, ValueError):
            return False  # not listening yet, or the key file not yet written
        return any(worker["status"] == "READY" for version in versions for worker in version["workers"])

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

    def _log(self) -> str:
        try:
            return (self.folder / "console.log").read_text(errors="replace")
        except FileNotFoundError:
            return ""

    def _log_tail(self) -> str:
        lines = [line for line in self._log().splitlines() if "ACCESS_LOG" not in line]
        return "\n".join([*lines[-LOG_TAIL_LINES:], f"(logs: {self.folder})"])


def unavailable(answer: str) -> str | None:
    """Why a model cannot be served, as its handler answered; None if it answered something else."""
    try:
        error = json.loads(answer)["error"]
        return str(error["message"]) if error["type"] == "unavailable" else None
    except (ValueError, KeyError, TypeError):
        return None


def load_error(log: str) -> str | None:
    """What TorchServe's console log says of a failed load, None while there is none.

    TorchServe does not retry such a load until a request arrives, and never gives the reason over HTTP.
    """
    if found := re.search(r"Failed to load model: (.+)", log):
        return f"TorchServe cannot read {found.group(1)}"
    if "Worker disconnected" not in log:
        return None
    # The worker's own lines, as `<time> [INFO ] <thread> MODEL_LOG - <line>`; the last traceback ends in the
    # error.
    worker = "\n".join(re.findall(r" MODEL_LOG - (.*)", log))
    traceback = worker.rpartition("Traceback (most recent call last):\n")[2] if "Traceback" in worker else ""
    error = [line for line in traceback.splitlines() if line and not line.startswith(" ")]
    return "\n".join(error) or "its worker process died without a word; it may be out of memory"


def read_properties(path: Path) -> dict[str, str]:
    """`key=value` lines of a TorchServe configuration; comments and blank lines are left out.

    Raises:
        CommandError: the file is not there.
    """
    if not path.is_file():
        raise CommandError(f"{path}: no such file; it is TorchServe's configuration and belongs to this project")
    lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    pairs = (line.split("=", 1) for line in lines if "=" in line and not line.startswith(("#", "!")))
    return {key.strip(): value.strip() for key, value in pairs}


def write_properties(path: Path, properties: Mapping[str, str]) -> None:
    path.write_text("".join(f"{key}={value}\n" for key, value in properties.items()), encoding="utf-8")
