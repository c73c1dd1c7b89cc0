"""MusicGen on TorchServe: the package that ships inside every archive."""

import os

# Read by torch when it first claims memory, in this process or the engine's. Weights in huge pages are read a fifth
# faster on a CPU; no page of 4 kB is worth looking up for each.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

# Read by glibc when the engine's process begins. It would give every thread an arena of its own, and what one has freed
# no other uses: memory crept up for seven hundred requests. With two it is level after the first hundred.
os.environ.setdefault("MALLOC_ARENA_MAX", "2")

__version__ = "0.1.0"
