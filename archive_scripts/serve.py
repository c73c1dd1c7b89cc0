"""`serve`: archives on a TorchServe of this machine."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any

from archive_scripts.arguments import DRAIN_SECONDS, DTYPES, MODEL_STORE, add_startup_timeout, device, workers
from archive_scripts.errors import CommandError
from archive_scripts.machine import gpu_count, thread_share
from archive_scripts.members import is_archive, model_name
from archive_scripts.pack import pack_if_needed
from archive_scripts.server import TorchServe
from archive_scripts.verify import require_whole_checkpoint
from handler.settings import OVERRIDES

HELP = "serve variants on this machine"
DESCRIPTION = """\
Serve one or more variants or archives with TorchServe on this machine until Ctrl-C or SIGTERM: packs what is not yet
in the model store, starts the server in a private folder of its own, has each model make a first clip (saved in
clips/), and prints how to call it.

config.properties in this project is what the server starts from; the port replaces the one written there.
Requests need a token, made at each start, unless --open is given; the printed lines show how to send it. While it
runs, `status`, `register`, `scale`, `set-default`, `unregister` and `token` work on it, from another terminal.

Each variant gets a worker, a process with the model in it, for each GPU; on a machine without GPUs, one. Several
workers without GPUs share the cores: OMP_NUM_THREADS is the cores divided by all workers, unless you set it.

At Ctrl-C, at SIGTERM and when its terminal is closed the server drains: new requests are answered with a 503, those it
has accepted are finished, their replies sent, and then it stops. A second Ctrl-C stops it at once. Give a service
manager more time than --drain before it kills: TimeoutStopSec in systemd, terminationGracePeriodSeconds in Kubernetes.

  python -m archive_scripts serve debug --open
  python -m archive_scripts serve small stereo-small --port 9000
  python -m archive_scripts serve model-store/large --workers 2 --drain 300
  python -m archive_scripts serve small --device cpu --workers 2 --dtype bfloat16
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
        "--workers", type=workers, help="workers of each variant (default: one for each GPU, or one on the CPU)"
    )
    parser.add_argument(
        "--device",
        type=device,
        help="cpu, cuda (one GPU for each worker, in turn) or cuda:N, for all variants (default: as each archive says, "
        "else cuda if there is one)",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="number format of the language models; int8 is for a CPU (default: as each archive says, else float16 on "
        "a GPU, float32 on a CPU)",
    )
    parser.add_argument(
        "--drain",
        metavar="SECONDS",
        type=float,
        default=DRAIN_SECONDS,
        help="how long to wait for accepted requests when the server is stopped (default: %(default)g)",
    )
    parser.add_argument(
        "--open", action="store_true", help="no tokens, for trials on this machine; loopback addresses only"
    )
    parser.add_argument(
        "--model-store", type=Path, default=MODEL_STORE, help="folder of archives (default: %(default)s)"
    )
    add_startup_timeout(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    archives = []
    for variant in args.variants:
        _say(f"{variant}: packing if needed")
        archives.append(find_archive(variant, args.model_store))
    models = [model_name(archive) for archive in archives]
    if len(set(models)) < len(models):
        raise CommandError(f"two of these would have the same name on the server: {', '.join(models)}")
    gpus = 0 if args.device == "cpu" else gpu_count()
    if gpus == 0 and args.device not in (None, "cpu"):
        raise CommandError(f"--device {args.device}: PyTorch finds no GPU on this machine; leave it out to use the CPU")
    each = args.workers or (1 if args.device and args.device != "cuda" else max(1, gpus))
    environment = handler_settings(args.device, args.dtype)
    if gpus == 0:
        environment |= thread_share(each * len(models))
    with TorchServe(archives, args.port, args.open, environment=environment, gpus=gpus) as server:
        _say(f"starting TorchServe on {server.url} (private folder: {server.folder})")
        for model in models:
            started = time.monotonic()
            server.wait_until_loaded(model, args.startup_timeout, each)
            count = "" if each == 1 else f" by {each} workers"
            _say(f"{model}: loaded{count} in {time.monotonic() - started:.1f} s")
            _make_first_clip(server, model, args.startup_timeout)
        _say("\nready; try")
        if not args.open:
            _say(f"  KEY=$(python -c '{READ_KEY}' {server.folder}/key_file.json)")
        for model in models:
            _say(f"  {curl_line(server.url, model, args.open)}")
        try:
            _say("\nCtrl-C stops the server")
            server.wait()
        except KeyboardInterrupt:
            _drain(server, args.drain)


def find_archive(variant: str, model_store: Path) -> Path:
    """The archive of a variant, packed if it is not in the model store; or the archive that was named.

    Raises:
        CommandError: it cannot be packed, or is a folder whose checkpoint is not whole.
    """
    named = is_archive(Path(variant))
    archive = Path(variant).resolve() if named else pack_if_needed(variant, model_store).resolve()
    if archive.is_dir():
        require_whole_checkpoint(archive)
    return archive


def handler_settings(device: str | None, dtype: str | None) -> dict[str, str]:
    """The environment that puts these before the `handler:` block of every archive, beside what it sets already; `cuda`
    leaves the choice of the GPU to TorchServe, which is the setting's default.

    Raises:
        CommandError: what it sets is no JSON object.
    """
    settings: dict[str, Any] = {"device": None if device == "cuda" else device} if device else {}
    settings |= {"dtype": dtype} if dtype else {}
    if not settings:
        return {}
    try:
        return {OVERRIDES: json.dumps({**json.loads(os.environ.get(OVERRIDES, "{}")), **settings})}
    except (TypeError, ValueError) as error:
        raise CommandError(f"{OVERRIDES} in the environment must be a JSON object: {error}") from error


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


def _drain(server: TorchServe, seconds: float) -> None:
    _say(f"\nfinishing what was accepted, for at most {seconds:g} s; Ctrl-C again stops at once")
    try:
        left = server.drain(seconds)
    except CommandError as error:
        left = 0
        _say(f"nothing can be finished any more: {error}")
    except KeyboardInterrupt:
        left = 0  # the operator does not want to know
    if left:
        _say(f"{left} requests were not finished in {seconds:g} s and are cut; --drain gives them more time")
    _say("stopping TorchServe")


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # the terminal may have been closed: there is a server to drain all the same
        print(text, flush=True)
