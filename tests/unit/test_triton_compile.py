"""The Triton kernels build for the GPUs they are meant for, on any machine that has Triton."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHARED_BYTES = {86: 99 * 1024, 90: 227 * 1024}
"""That a program can have, by compute capability: an A10's (an L4's and an RTX 40's is the same), and an H100's or
H200's; an A100's is in between.
"""

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton has wheels for Linux on x86-64 alone"
)


@pytest.mark.parametrize("capability", SHARED_BYTES)
def test_every_kernel_builds_in_every_dtype_and_fits_the_gpu(capability: int, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", "tests.compile_kernels", str(capability)],
        cwd=ROOT,
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    kernels = [line.split() for line in run.stdout.splitlines()]
    assert {name for name, *_ in kernels} == {"_linear", "_attend", "_embed", "_sample"}
    assert all(int(shared) <= SHARED_BYTES[capability] for *_, shared in kernels)
