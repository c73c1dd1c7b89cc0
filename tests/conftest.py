"""What holds for every test."""

from __future__ import annotations

import os

# The models are tiny: one thread is the fastest, and two test processes on two cores do not wait for each other.
# Servers that tests start inherit it. Set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
