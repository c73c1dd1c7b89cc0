"""The machine: what it is, and how fast it reads memory, multiplies matrices and reads files."""

from __future__ import annotations

import platform
import subprocess
import time
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path

import psutil
import torch

from handler.cgroup import available_cores, available_memory
from handler.linear import Linear

ROOT = Path(__file__).resolve().parent.parent

_BUFFER_BYTES = {"cpu": 2**30, "cuda": 2**32}
_MATRIX = {"cpu": 2048, "cuda": 8192}
_TRIES = 10


def kind(device: str) -> str:
    """`cpu` or `cuda`."""
    return torch.device(device).type


def synchronise(device: str) -> None:
    """Waits until the device has done all it was given."""
    if kind(device) == "cuda":
        torch.cuda.synchronize(device)


def describe(device: str) -> dict[str, str]:
    """What the figures were measured on and with."""
    facts = {}
    if kind(device) == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts["GPU"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        facts["CUDA"] = str(torch.version.cuda)
    instructions = torch.backends.cpu.get_cpu_capability()
    facts["CPU"] = f"{_cpu_name()} ({instructions}), {available_cores()} cores, {torch.get_num_threads()} threads used"
    facts["memory"] = f"{psutil.virtual_memory().total / 2**30:.0f} GiB"
    facts["system"] = f"{platform.system()}, Python {platform.python_version()}"
    facts["torch"] = torch.__version__
    facts["transformers"] = version("transformers")
    facts["this project"] = _commit()
    return facts


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _commit() -> str:
    """The commit, with `-dirty` where the working tree differs from it."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "not in a git repository"


def memory_reader(device: str) -> tuple[Callable[[], object], int]:
    """A call that has all cores together read memory that no cache holds, and how many bytes."""
    buffer = torch.ones(_BUFFER_BYTES[kind(device)] // 4, device=device)
    return buffer.sum, buffer.nbytes


def matmul_rate(device: str) -> float:
    """Floating-point operations a second of a large float32 matrix product, the best of several; on a CPU of the
    faster of torch's two libraries."""
    n = _MATRIX[kind(device)]
    a = torch.ones(n, n, device=device)
    prepacked = Linear(a, None, a.device, a.dtype)
    return 2 * n**3 / min(_fastest(lambda: a @ a, device), _fastest(lambda: prepacked(a), device))


def file_bandwidth(files: Iterable[Path]) -> float:
    """Bytes a second of reading files that the page cache holds, into memory and in one thread; the best of three."""
    files = list(files)
    buffer = bytearray(2**24)

    def read() -> None:
        for path in files:
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass

    read()
    return sum(path.stat().st_size for path in files) / _fastest(read, "cpu", tries=3)


def _fastest(call: Callable[[], object], device: str, tries: int = _TRIES) -> float:
    call()
    times = []
    for _ in range(tries):
        synchronise(device)
        began = time.perf_counter()
        call()
        synchronise(device)
        times.append(time.perf_counter() - began)
    return min(times)


def free_memory(device: str) -> int:
    """Bytes that can still be claimed."""
    if kind(device) == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return available_memory()
