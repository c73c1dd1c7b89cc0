"""The cores and the memory that this process may use: the machine's, or its cgroup's where those are fewer.

A container sees all cores and all memory of its machine. Threads beyond its quota of processor time are stopped in the
middle of a decode step, and memory beyond its limit ends the process, so both are read from the cgroup: version 2
(`cpu.max`, `memory.max`, `memory.current`) and version 1 (`cpu.cfs_quota_us`, `memory.limit_in_bytes`). A limit holds
for all cgroups below it, so every folder from this process's own up to the mount point counts.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import psutil

MACHINE = Path("/")


def available_cores(root: Path = MACHINE) -> int:
    """The cores this process may keep busy, at least 1: those it is bound to, or whole cores of its quota if fewer.

    Args:
        root: what `/proc` and `/sys` are read from.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [quota for folder in _folders("cpu", root) if (quota := _quota(folder)) is not None]
    return max(1, int(min([cores, *quotas])))


def available_memory(root: Path = MACHINE) -> int:
    """The bytes this process can still claim: free on the machine, or within its limits if less.

    Cached file pages count as free, since the kernel drops them before it refuses memory.

    Args:
        root: what `/proc` and `/sys` are read from.
    """
    free = [left for folder in _folders("memory", root) if (left := _left(folder)) is not None]
    return max(0, min([int(psutil.virtual_memory().available), *free]))


def _folders(controller: str, root: Path) -> Iterator[Path]:
    """This process's folders of a controller, of either version, each with all folders above it."""
    for mount_root, mount_point, controllers in _mounts(root):
        path = _cgroups(root).get(controller if controllers else "")
        if path is None or (controllers and controller not in controllers):
            continue
        # In a container the mount may show its own cgroup as the top: the path is then of a tree that is not there.
        inside = path == mount_root or path.startswith(mount_root.rstrip("/") + "/")
        parts = Path(path[len(mount_root) :].strip("/")).parts if inside else ()
        if ".." in parts:
            parts = ()
        top = root / mount_point.lstrip("/")
        for depth in range(len(parts), -1, -1):
            yield top.joinpath(*parts[:depth])


def _cgroups(root: Path) -> dict[str, str]:
    """The path of this process in the tree of each controller; in version 2's one tree by the name ``""``."""
    lines = (line.split(":", 2) for line in _text(root / "proc/self/cgroup").splitlines())
    return {name: path for _, names, path in (line for line in lines if len(line) == 3) for name in names.split(",")}


def _mounts(root: Path) -> Iterator[tuple[str, str, frozenset[str]]]:
    """Of each mounted cgroup tree: its top's own path, where it is mounted, and its controllers; none in version 2."""
    for line in _text(root / "proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        fields, kind = before.split(), after.split()
        if len(fields) < 5 or len(kind) < 3 or kind[0] not in ("cgroup", "cgroup2"):
            continue
        controllers = frozenset(kind[2].split(",")) if kind[0] == "cgroup" else frozenset()
        yield _unescaped(fields[3]), _unescaped(fields[4]), controllers


def _quota(folder: Path) -> float | None:
    """Cores' worth of processor time; None where it is not limited."""
    quota = _text(folder / "cpu.max").split() or [
        _text(folder / "cpu.cfs_quota_us").strip(),
        _text(folder / "cpu.cfs_period_us").strip(),
    ]
    time, period = (_number(text) for text in (quota if len(quota) == 2 else ("", "")))
    return time / period if time is not None and time > 0 and period else None


def _limit(folder: Path) -> int | None:
    """Bytes of memory; None where it is not limited."""
    names = ("memory.max", "memory.high", "memory.limit_in_bytes")
    limits = [limit for name in names if (limit := _number(_text(folder / name).strip())) is not None]
    return min(limits, default=None)


def _left(folder: Path) -> int | None:
    """Bytes within the limit that are not in use, or hold file pages; None where there is no limit."""
    limit = _limit(folder)
    used = _number(_text(folder / "memory.current").strip() or _text(folder / "memory.usage_in_bytes").strip())
    if limit is None or used is None:
        return None
    statistics = dict(line.split() for line in _text(folder / "memory.stat").splitlines() if len(line.split()) == 2)
    kinds = ("inactive_file", "active_file")
    # Version 1 counts a folder's own pages by these names, and those of all below it with `total_` before.
    cached = sum(_number(statistics.get(f"total_{kind}", statistics.get(kind, "0"))) or 0 for kind in kinds)
    return limit - used + cached


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _number(text: str) -> int | None:
    """None for `max`, for what is not there, and for what is not a number."""
    try:
        return int(text)
    except ValueError:
        return None


def _unescaped(path: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), path)
