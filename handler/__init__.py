"""MusicGen on TorchServe: the package that ships inside every archive."""

import os

# Read by torch when it first claims memory, in this process or the engine's. Weights in huge pages are read a fifth
# faster on a CPU; no page of 4 kB is worth looking up for each.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

# Read by glibc when the engine's process begins. It would give every thread an arena of its own, and what one has freed
# no other uses: memory crept up for seven hundred requests. With two it is level after the first hundred.
os.environ.setdefault("MALLOC_ARENA_MAX", "2")

# Read by libgomp when torch is loaded. A thread that waits for the others spins this many times, about 0.1 ms, and then
# sleeps. libgomp's own 300,000 keep a core from the very thread that is waited for when another process is busy there:
# two engines and a busy process on two cores took 840 ms a step, and 360 ms with this; one engine alone takes the same.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

__version__ = "0.1.0"
