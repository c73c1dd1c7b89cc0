"""`generate`: a clip without a server."""

from __future__ import annotations

import argparse
import re
import secrets
from pathlib import Path
from typing import Any

from archive_scripts.arguments import DTYPES
from archive_scripts.errors import CommandError
from handler.cgroup import available_cores

HELP = "generate a clip without a server"
DESCRIPTION = """\
Load a checkpoint in this process, generate one clip and write it to a file. The same seed gives the same
file.

  python -m archive_scripts generate small "80s pop with heavy drums" -o pop.wav --duration 12 --seed 7
"""
FORMATS = ("wav", "flac", "mp3", "ogg", "opus", "aac")


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "generate", help=HELP, description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("variant", metavar="VARIANT", help="a name, hub id or folder")
    parser.add_argument("prompt", nargs="?", default="", help="what to play; without it, anything")
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("clip.wav"), help=f"file to write, .{', .'.join(FORMATS)}"
    )
    parser.add_argument("--duration", type=float, default=8.0, help="seconds (default: %(default)s)")
    parser.add_argument("--seed", type=int, help="0 to 2^63-1; without it one is drawn and printed")
    parser.add_argument("--temperature", type=float, default=1.0, help="default: %(default)s; 0 is greedy")
    parser.add_argument("--top-k", type=int, default=250, help="default: %(default)s; 0 switches it off")
    parser.add_argument("--top-p", type=float, default=0.0, help="default: %(default)s; above 0 it replaces top-k")
    parser.add_argument("--cfg-coef", type=float, default=3.0, help="guidance (default: %(default)s)")
    parser.add_argument("--hub-dir", type=Path, help="folder of auxiliary models (t5-base, …)")
    parser.add_argument("--revision", help="branch, tag or commit of the hub repository (default: main)")
    parser.add_argument("--device", type=_device, help="cpu, cuda or cuda:N (default: cuda if there is one)")
    parser.add_argument("--dtype", choices=DTYPES, help="number format (default: float16 on a GPU, else float32)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    audio_format = args.output.suffix.removeprefix(".").lower()
    if audio_format not in FORMATS:
        raise CommandError(f"--output {args.output}: the name must end in .{', .'.join(FORMATS)}")
    if not args.output.parent.is_dir():
        raise CommandError(f"--output {args.output}: there is no folder {args.output.parent}")
    # Loading PyTorch takes seconds; `--help` and wrong arguments should not.
    import torch

    from handler.audio import normalize
    from handler.audio_encoder import encode
    from handler.musicgen import Clip, GenerationParams, MusicGen

    torch.set_num_threads(min(torch.get_num_threads(), available_cores()))

    seed = secrets.randbelow(2**53) if args.seed is None else args.seed
    params = GenerationParams(
        duration=args.duration,
        seed=seed,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        cfg_coef=args.cfg_coef,
    )
    model = MusicGen.get_pretrained(
        args.variant, device=args.device, dtype=args.dtype, hub_dir=args.hub_dir, revision=args.revision
    )
    with _progress() as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        wav, _ = model.generate_clip(Clip(description=args.prompt), params, callback=show)
    wav = normalize(wav.cpu(), model.sample_rate, "loudness")
    audio = encode(wav, model.sample_rate, audio_format, seed)
    args.output.write_bytes(audio.data)
    seconds = wav.shape[-1] / model.sample_rate
    print(f"{args.output}  {seconds:g} s at {audio.sample_rate} Hz, seed {seed}")


def _device(name: str) -> str:
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise argparse.ArgumentTypeError(f"{name}: must be cpu, cuda or cuda:N")
    return name


def _progress() -> Any:
    from tqdm import tqdm

    return tqdm(desc="generating", unit="step", leave=False, disable=None)
