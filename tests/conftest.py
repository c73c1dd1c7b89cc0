"""What holds for every test."""

from __future__ import annotations

import os
import signal
from pathlib import Path

# The models are tiny: one thread is the fastest, and two test processes on two cores do not wait for each other.
# Servers that tests start inherit it. Set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Triton's kernels are interpreted where there is no GPU. Triton reads this when it is first imported, which some other
# library may do; so there is no asking torch for a GPU before.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A shell that runs tests in the background, or nohup, has these ignored, and so would every process that a test starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
