"""Cores and memory are those of the container where it has fewer than the machine, in either version of cgroups."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from handler.cgroup import available_cores, available_memory

ROOT = Path(__file__).resolve().parents[2]
CORES = len(os.sched_getaffinity(0))
GIB = 2**30
NO_LIMIT = "9223372036854771712"  # what version 1 says


@pytest.fixture(autouse=True)
def _large_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    memory = psutil.virtual_memory()._replace(available=100 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)


def machine(root: Path, cgroup: str, mounts: str, files: dict[str, str]) -> Path:
    """A machine's files of cgroups, as its kernel would show them."""
    proc = root / "proc/self"
    proc.mkdir(parents=True)
    (proc / "cgroup").write_text(cgroup)
    (proc / "mountinfo").write_text(mounts)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


V2 = "31 23 0:28 / /sys/fs/cgroup rw,relatime shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = (
    "31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755\n"
    "32 31 0:29 {root} /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct\n"
    "35 31 0:32 {root} /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n"
    "41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n"
)
STAT = "anon 3000000000\ninactive_file {inactive}\nactive_file {active}\n"


def test_version_2_limits_of_a_container(tmp_path: Path) -> None:
    files = {
        "cpu.max": "400000 100000\n",
        "memory.max": f"{8 * GIB}\n",
        "memory.current": f"{5 * GIB}\n",
        "memory.stat": STAT.format(inactive=GIB, active=GIB // 2),
    }
    root = machine(tmp_path, "0::/\n", V2, files)
    assert available_cores(root) == 4
    assert available_memory(root) == 4.5 * GIB


def test_a_limit_of_a_cgroup_further_up_holds_too(tmp_path: Path) -> None:
    files = {
        "kubepods/cpu.max": "3200000 100000\n",
        "kubepods/pod1/cpu.max": "250000 100000\n",
        "kubepods/pod1/memory.max": f"{4 * GIB}\n",
        "kubepods/pod1/memory.current": f"{GIB}\n",
        "kubepods/pod1/box/cpu.max": "max 100000\n",
        "kubepods/pod1/box/memory.max": "max\n",
        "kubepods/pod1/box/memory.current": f"{GIB}\n",
    }
    root = machine(tmp_path, "0::/kubepods/pod1/box\n", V2, files)
    assert available_cores(root) == 2  # whole cores of 2.5: a third thread would be stopped half of the time
    assert available_memory(root) == 3 * GIB


@pytest.mark.parametrize("top", ["/", "/docker/4f1c"], ids=["the whole tree", "its own part of the tree"])
def test_version_1_limits_of_a_container(top: str, tmp_path: Path) -> None:
    folder = "docker/4f1c/" if top == "/" else ""
    files = {
        f"cpu,cpuacct/{folder}cpu.cfs_quota_us": "100000\n",
        f"cpu,cpuacct/{folder}cpu.cfs_period_us": "50000\n",
        f"memory/{folder}memory.limit_in_bytes": f"{2 * GIB}\n",
        f"memory/{folder}memory.usage_in_bytes": f"{2 * GIB}\n",
        f"memory/{folder}memory.stat": f"active_file 5\ntotal_inactive_file {GIB}\ntotal_active_file 7\n",
        "unified/cgroup.procs": "1\n",
    }
    cgroup = "4:memory:/docker/4f1c\n1:cpu,cpuacct:/docker/4f1c\n0::/\n"
    root = machine(tmp_path, cgroup, V1.format(root=top), files)
    assert available_cores(root) == 2
    assert available_memory(root) == GIB + 7


def test_memory_above_which_the_kernel_slows_a_process_down_is_a_limit_too(tmp_path: Path) -> None:
    files = {"memory.max": f"{8 * GIB}\n", "memory.high": f"{6 * GIB}\n", "memory.current": f"{GIB}\n"}
    assert available_memory(machine(tmp_path, "0::/\n", V2, files)) == 5 * GIB


def test_there_is_one_core_and_no_negative_memory_at_least(tmp_path: Path) -> None:
    files = {"cpu.max": "20000 100000\n", "memory.max": f"{GIB}\n", "memory.current": f"{2 * GIB}\n"}
    root = machine(tmp_path, "0::/\n", V2, files)
    assert (available_cores(root), available_memory(root)) == (1, 0)


@pytest.mark.parametrize(
    ("cgroup", "mounts", "files"),
    [
        ("", "", {}),
        ("0::/\n", V2, {"cpu.max": "max 100000\n", "memory.max": "max\n", "memory.current": "5\n"}),
        ("0::/gone\n", V2, {}),
        ("0::/../elsewhere\n", V2, {}),
        ("0::/\n", V2, {"cpu.max": "\n", "memory.max": "lots\n"}),
        ("0::/\n", V2, {"cpu.max": "100000 0\n"}),
        ("nonsense\n", "nonsense\n", {}),
        (
            "1:cpu,cpuacct:/\n4:memory:/\n0::/\n",
            V1.format(root="/"),
            {
                "cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
                "cpu,cpuacct/cpu.cfs_period_us": "100000\n",
                "memory/memory.limit_in_bytes": NO_LIMIT,
                "memory/memory.usage_in_bytes": "5\n",
            },
        ),
    ],
)
def test_without_limits_the_machine_is_the_limit(
    cgroup: str, mounts: str, files: dict[str, str], tmp_path: Path
) -> None:
    root = machine(tmp_path, cgroup, mounts, files)
    assert (available_cores(root), available_memory(root)) == (64, 100 * GIB)


def test_a_process_bound_to_some_cores_has_those(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5})
    assert available_cores(machine(tmp_path, "0::/\n", V2, {"cpu.max": "400000 100000\n"})) == 2


ENGINE = """
import logging, os, sys, torch
from handler.cgroup import available_cores, available_memory
from handler.engine.engine import Engine
from handler.engine.process import _load
from handler.engine.spec import ModelSpec
from tests.parity.models import GOLDENS
spec = ModelSpec(GOLDENS / "text_mono", GOLDENS / "hub", "cpu", None, None, 1000, None, 64, 1.0)
scheduler, card = _load(spec, lambda name, event: None, lambda: None)
print(available_cores(), torch.get_num_threads(), available_memory() // 2**20, card.concurrency)
os._exit(0)
"""


@pytest.fixture
def limited() -> Iterator[list[Path]]:
    """Folders of a new cgroup of one core and 1.5 GiB, in whichever version this machine mounts."""
    if os.geteuid() != 0:
        pytest.skip("only root can make a cgroup")
    name, made = f"musicgen-{uuid.uuid4().hex[:8]}", []
    limits = {
        "cpu": {"cpu.max": "100000 100000", "cpu.cfs_quota_us": "100000"},
        "memory": {"memory.max": str(3 * GIB // 2), "memory.limit_in_bytes": str(3 * GIB // 2)},
    }
    try:
        for controller, values in limits.items():
            parents = [Path("/sys/fs/cgroup") / controller, Path("/sys/fs/cgroup")]
            parent = next((path for path in parents if (path / "cgroup.procs").exists()), None)
            if parent is None:
                pytest.skip("no cgroups are mounted here")
            folder = parent / name
            folder.mkdir(exist_ok=True)
            made.append(folder)
            for file, value in values.items():
                if (folder / file).exists():
                    (folder / file).write_text(value)
                    break
            else:
                pytest.skip(f"the controller {controller} is not to be had here")
        yield made
    except OSError as error:
        pytest.skip(f"no cgroup can be made here: {error}")
    finally:
        for folder in reversed(made):
            with suppress(OSError):
                folder.rmdir()


def test_an_engine_keeps_to_the_limits_of_a_real_cgroup(limited: list[Path]) -> None:
    def join() -> None:
        for folder in limited:
            (folder / "cgroup.procs").write_text(str(os.getpid()))

    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    engine = subprocess.run(
        [sys.executable, "-c", ENGINE],
        capture_output=True,
        text=True,
        preexec_fn=join,
        cwd=ROOT,
        env=environment,
        timeout=120,
    )
    assert engine.returncode == 0, engine.stderr
    cores, threads, mebibytes, concurrency = map(int, engine.stdout.split())
    assert (cores, threads) == (1, 1)
    assert mebibytes < 1536
    assert concurrency < 1000  # keys and values for all would not fit
