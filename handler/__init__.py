"""MusicGen on TorchServe: the package that ships inside every archive."""

import os

# Read by torch when it first claims memory, in this process or the engine's. Weights in huge pages are read a fifth
# faster on a CPU; no page of 4 kB is worth looking up for each.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

__version__ = "0.1.0"
