"""`serve`: archives on a TorchServe of this machine."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from archive_scripts.errors import CommandError
from archive_scripts.members import is_archive, model_name
from archive_scripts.pack import MODEL_STORE, pack_if_needed
from archive_scripts.server import TorchServe

HELP = "serve variants on this machine"
DESCRIPTION = """\
Serve one or more variants or archives with TorchServe on this machine until Ctrl-C: packs what is not yet in the
model store, starts the server in a private folder of its own, has each model make a first clip (saved in clips/),
and prints how to call it.

config.properties in this project is what the server starts from; the port replaces the one written there.
Requests need a token, made at each start, unless --open is given; the printed lines show how to send it.

  python -m archive_scripts serve debug --open
  python -m archive_scripts serve small stereo-small --port 9000
  python -m archive_scripts serve model-store/large
"""
CLIPS = Path("clips")
CANARY = {"prompt": "80s pop with heavy drums", "duration": 4, "seed": 0}
READ_KEY = 'import json, sys; print(json.load(open(sys.argv[1]))["inference"]["key"])'


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "serve", help=HELP, description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("variants", metavar="VARIANT", nargs="+", help="a name, hub id or folder, or an archive")
    parser.add_argument(
        "--port",
        type=int,
        default=8080,
        help="port of requests (default: %(default)s); the next two serve management and metrics",
    )
    parser.add_argument(
        "--open", action="store_true", help="no tokens, for trials on this machine; loopback addresses only"
    )
    parser.add_argument(
        "--model-store", type=Path, default=MODEL_STORE, help="folder of archives (default: %(default)s)"
    )
    parser.add_argument(
        "--startup-timeout",
        type=float,
        default=1200,
        help="seconds a model may take to load and make its first clip (default: %(default)s)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    archives = []
    for variant in args.variants:
        if is_archive(Path(variant)):
            archives.append(Path(variant).resolve())
            continue
        _say(f"{variant}: packing if needed")
        archives.append(pack_if_needed(variant, args.model_store).resolve())
    models = [model_name(archive) for archive in archives]
    if len({archive.parent for archive in archives}) > 1:
        raise CommandError("all archives must be in one folder, the model store; name it with --model-store")
    if len(set(models)) < len(models):
        raise CommandError(f"two of these would have the same name on the server: {', '.join(models)}")
    with TorchServe(archives, args.port, args.open) as server:
        _say(f"starting TorchServe on {server.url} (private folder: {server.folder})")
        for model in models:
            started = time.monotonic()
            server.wait_until_loaded(model, args.startup_timeout)
            _say(f"{model}: loaded in {time.monotonic() - started:.1f} s")
            _make_first_clip(server, model, args.startup_timeout)
        _say("\nready; try")
        if not args.open:
            _say(f"  KEY=$(python -c '{READ_KEY}' {server.folder}/key_file.json)")
        for model in models:
            _say(f"  {curl_line(server.url, model, args.open)}")
        _say("\nCtrl-C stops the server")
        try:
            server.wait()
        except KeyboardInterrupt:
            _say("\nstopping TorchServe")


def curl_line(server_url: str, model: str, open_profile: bool) -> str:
    """What to type to hear the model; KEY holds the inference key where one is needed."""
    token = "" if open_profile else '-H "Authorization: Bearer $KEY" '
    return f"curl {token}-d 'prompt={CANARY['prompt']}' {server_url}/predictions/{model} -o clip.wav"


def _make_first_clip(server: TorchServe, model: str, timeout: float) -> None:
    started = time.monotonic()
    audio, headers = server.generate(model, CANARY, timeout)
    took = time.monotonic() - started
    CLIPS.mkdir(exist_ok=True)
    clip = CLIPS / f"{model}.wav"
    clip.write_bytes(audio)
    seconds = headers.get("x-duration", CANARY["duration"])
    _say(f"{model}: first clip saved as {clip} ({seconds} s of audio, made in {took:.1f} s)")


def _say(text: str) -> None:
    print(text, flush=True)
