"""What an engine is asked to be."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What the process loads, and how much it may hold.

    Attributes:
        checkpoint, hub_dir: folders of the model and of its auxiliary models.
        device, dtype: as `MusicGen.get_pretrained`.
        threads: of torch on a CPU; None is torch's own choice, or the cores of the container if fewer.
        max_concurrency: requests that run together, at most.
        memory_budget: bytes for the model, keys and values; None is a share of what is free once the model is loaded.
        max_prompt_tokens: the longest text, which a prepended condition must find room for.
        chunk_seconds: seconds of one chunk of audio.
        deterministic, cuda_graphs: of the decode step on a GPU, see `StaticDecoder`.
        patience: seconds after which a turn of the scheduler counts as hanging, and ends the process.
    """

    checkpoint: Path
    hub_dir: Path
    device: str
    dtype: str | None
    threads: int | None
    max_concurrency: int
    memory_budget: int | None
    max_prompt_tokens: int
    chunk_seconds: float
    deterministic: bool = True
    cuda_graphs: bool = True
    patience: float = math.inf
