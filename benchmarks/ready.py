"""`python -m benchmarks.ready SIDE FOLDER DEVICE DTYPE`: loads a model, takes one decode step, and says what it took.

A process of its own, that imports nothing before its clock runs.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

Step = Callable[[], None]
WeightBytes = Callable[[], int]
Loader = Callable[[Path, str, str], tuple[Step, WeightBytes]]
"""From the folder, the device and the dtype to the first step, and to the bytes of what is loaded."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """What one process reports of itself.

    Attributes:
        import_seconds, load_seconds, step_seconds: one after the other.
        imported_bytes, imported_anonymous_bytes: resident before loading, in all and without files' pages.
        peak_bytes: the most that was ever resident, mapped files included.
        weight_bytes: of all tensors of the loaded model, in their dtypes.
    """

    import_seconds: float
    load_seconds: float
    step_seconds: float
    imported_bytes: int
    imported_anonymous_bytes: int
    peak_bytes: int
    weight_bytes: int


def load(side: str, folder: Path, device: str, dtype: str) -> Loaded:
    """Imports what a side needs, loads its model in this process and takes the first step.

    Args:
        side: `ours` or `transformers`.
        folder: the checkpoint, or what `peer_folder` made of it.
        device, dtype: where to load, and in what the language model computes.
    """
    began = time.perf_counter()
    loader = {"ours": _import_ours, "transformers": _import_theirs}[side]()
    import torch

    imported = time.perf_counter()
    before = memory_of("self")
    with torch.inference_mode():
        step, weight_bytes = loader(folder, device, dtype)
        _synchronise(torch.device(device))
        loaded = time.perf_counter()
        step()
        _synchronise(torch.device(device))
        stepped = time.perf_counter()
    return Loaded(
        imported - began,
        loaded - imported,
        stepped - loaded,
        before.get("VmRSS", 0),
        before.get("RssAnon", 0),
        memory_of("self").get("VmHWM", 0),
        weight_bytes(),
    )


def memory_of(pid: int | str) -> dict[str, int]:
    """A process's memory in bytes, by the names Linux gives (VmRSS, VmHWM, RssAnon); none once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith(" kB")}


def _synchronise(device: torch.device) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _import_ours() -> Loader:
    from transformers import T5EncoderModel, T5Tokenizer  # noqa: F401 (or they would count as loading)

    from benchmarks.ours import Ours
    from benchmarks.weights import bytes_of, tensors_of
    from handler.musicgen import MusicGen

    def loader(folder: Path, device: str, dtype: str) -> tuple[Step, WeightBytes]:
        model = MusicGen.get_pretrained(folder, device, dtype, folder / "hub")
        side = Ours(model, 1, 1.0)

        def step() -> None:
            side.begin()
            side.step()

        return step, lambda: bytes_of(tensors_of([model.lm, model.compression_model, model.conditioning]))

    return loader


def _import_theirs() -> Loader:
    import torch
    from transformers import (  # noqa: F401 (or they would count as loading)
        EncodecModel,
        MusicgenForConditionalGeneration,
        MusicgenMelodyForConditionalGeneration,
        T5EncoderModel,
        T5Tokenizer,
    )

    from benchmarks.ours import PROMPT
    from benchmarks.peer import PeerDecoder, load
    from benchmarks.weights import bytes_of, tensors_of

    def loader(folder: Path, device: str, dtype: str) -> tuple[Step, WeightBytes]:
        tokenizer = T5Tokenizer.from_pretrained(folder)
        model = load(folder, dtype, device)

        def step() -> None:
            ids = torch.tensor([tokenizer(PROMPT).input_ids], device=device)  # [1, L]
            side = PeerDecoder(model)
            side.begin(side.conditions(model.enc_to_dec_proj(model.text_encoder(ids).last_hidden_state)))
            side.step()

        return step, lambda: bytes_of(tensors_of(model))

    return loader


def main(side: str, folder: str, device: str, dtype: str) -> None:
    print(json.dumps(asdict(load(side, Path(folder), device, dtype))))


if __name__ == "__main__":
    main(*sys.argv[1:])
