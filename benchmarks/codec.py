"""Decoding audio: ours beside transformers' EncodecModel, in chunks beside whole, and beside the rate of products."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import machine
from benchmarks.checkpoints import checkpoint_of
from benchmarks.peer import load, peer_folder
from benchmarks.report import NONE, Table
from benchmarks.timing import in_turns
from handler.checkpoint import COMPRESSION_FILE, Checkpoint, read_checkpoint
from handler.compression import load_encodec
from handler.compression.encodec import EncodecModel
from handler.compression.streaming import StreamingDecoder
from handler.gpu import compute_exactly

COLUMNS = (
    "clip, s",
    "side",
    "seconds",
    "times real time",
    "times the peer",
    "over whole-clip decode",
    "largest difference to the peer",
    "limit, s",
    "share of the limit",
)


def run(args: argparse.Namespace) -> list[Table]:
    """The benchmark, as the command line asks for it."""
    peer = args.peer == "transformers"
    return measure(args.dims, checkpoint_of(args.dims), args.device, args.lengths, args.chunk, args.repeats, peer)


@torch.inference_mode()
def measure(
    name: str, checkpoint: Path, device: str, lengths: Sequence[float], chunk: float, repeats: int, with_peer: bool
) -> list[Table]:
    """Decodes random codes of clips of some lengths, on every side in turns.

    Args:
        name: of the dimensions, for the title.
        checkpoint: the folder.
        device: where to run; float32 everywhere, without the shorter products of a GPU (TF32).
        lengths: of the clips, in seconds.
        chunk: seconds of one chunk of the streaming decoder; its first is half of one, as the engine has it.
        repeats: how often.
        with_peer: whether to measure it.
    """
    compute_exactly()
    rate = 0.0
    exported = read_checkpoint(checkpoint / COMPRESSION_FILE)
    assert isinstance(exported, Checkpoint)
    model = load_encodec(exported.config, exported.state, exported.source).to(device)
    peer = load(peer_folder(checkpoint), "float32", device).audio_encoder if with_peer else None
    rows = []
    for seconds in lengths:
        frames = round(seconds * model.frame_rate)
        generator = torch.Generator().manual_seed(0)
        codes = torch.randint(model.cardinality, (1, model.num_codebooks, frames), generator=generator).to(device)
        rate = max(rate, machine.matmul_rate(device))  # again each time, or a busy moment would flatter us
        rows += _rows(model, peer, codes, round(chunk * model.frame_rate), repeats, rate, device)
    notes = [
        f"Float32, random codes, {repeats} turns. The streaming decoder takes chunks of {chunk:g} s.",
        f"Rate of a float32 matrix product: {rate / 1e9:.0f} Gflop/s. The limit is the convolutions' and the LSTM's "
        "operations at that rate.",
    ]
    return [Table(f"Codec, {name}, {device}", COLUMNS, rows, notes)]


def _rows(
    model: EncodecModel, peer: Any, codes: Tensor, chunk: int, repeats: int, rate: float, device: str
) -> list[list[str]]:
    sides: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: model.decode(codes)[0],
        "ours, in chunks": partial(_in_chunks, model, codes[0], chunk),
    }
    if peer is not None:
        sides["transformers"] = lambda: peer.decode(codes[None], [None])[0][0]
    clips = {name: decode() for name, decode in sides.items()}  # the warm-up too
    seconds = codes.shape[-1] / model.frame_rate
    times = in_turns(sides, repeats, device, f"codec, {seconds:g} s")
    limit = _flops(model, codes) / rate
    rows = []
    for name, spread in times.items():
        theirs = times.get("transformers")
        difference = None if theirs is None else float((clips[name] - clips["transformers"]).abs().max())
        rows.append(
            [
                f"{seconds:g}",
                name,
                f"{spread:.3f}",
                f"{seconds / spread.median:.1f}",
                NONE if theirs is None else f"{theirs.over(spread):.2f}",
                f"{spread.over(times['ours']):.2f}" if name == "ours, in chunks" else NONE,
                NONE if difference is None else f"{difference:.1e} of {float(clips[name].abs().max()):.2f}",
                f"{limit:.3f}",
                f"{limit / spread.median:.0%}",
            ]
        )
    return rows


def _in_chunks(model: EncodecModel, codes: Tensor, chunk: int) -> Tensor:
    """The audio `[C, T]` of codes `[K, frames]`, half a chunk first, then whole ones."""
    decoder = StreamingDecoder(model)
    half = max(1, chunk // 2)
    chunks = [codes[:, :half], *codes[:, half:].split(chunk, dim=1)]
    return torch.cat([*(decoder.push(part) for part in chunks), decoder.finish()], dim=1)


def _flops(model: EncodecModel, codes: Tensor) -> float:
    """Of decoding: the convolutions as torch counts them, and the LSTM, which it does not count."""
    decoder, latent = model.decoder, model.decode_latent(codes)
    with FlopCounterMode(display=False) as counter:
        decoder(latent)
    lstms = [module for module in decoder.modules() if isinstance(module, torch.nn.LSTM)]
    recurrent = sum(weight.numel() for lstm in lstms for weight in lstm.parameters() if weight.dim() == 2)
    return counter.get_total_flops() + 2.0 * recurrent * codes.shape[-1] * codes.shape[0]
