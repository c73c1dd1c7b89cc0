"""Serves archives and asks each for music that its conditioner steers; for `test_variants`, which runs it offline.

    python -m tests.e2e.ask_variants FOLDER ARCHIVE…

It writes the replies to FOLDER, and `report.json` about them.
"""

from __future__ import annotations

import io
import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

import numpy as np
import requests
import soundfile

from archive_scripts.members import model_name
from archive_scripts.server import TorchServe
from handler.registry import VARIANTS
from tests.e2e.conftest import STARTUP_SECONDS, free_ports

# An address that is set aside for documentation: with a network, connecting to it runs into the timeout.
ELSEWHERE = ("192.0.2.1", 443)


def main(folder: Path, archives: list[Path]) -> None:
    report: dict[str, Any] = {"offline_by": os.environ["OFFLINE_BY"], "elsewhere": _connect(), "statuses": {}}
    with TorchServe(archives, free_ports(3), open_profile=True) as server:
        for archive in archives:
            server.wait_until_loaded(model_name(archive), STARTUP_SECONDS)
        for archive in archives:
            model = model_name(archive)
            conditioner = VARIANTS[model].conditioners[-1]
            statuses = report["statuses"][model] = {}
            for name, number in (("first", 0), ("again", 0), ("other", 1)):
                fields: dict[str, Any] = {"duration": 1, "seed": 5, "normalization": "none", "prompt": "calm piano"}
                if conditioner == "description":
                    fields["prompt"] = ("happy rock", "a sad and slow violin")[number]
                files = None if conditioner == "description" else {conditioner: ("clip.wav", _tune(number))}
                url = f"{server.url}/predictions/{model}"
                reply = requests.post(url, data=fields, files=files, timeout=STARTUP_SECONDS)
                (folder / f"{model}-{name}").write_bytes(reply.content)
                statuses[name] = reply.status_code
    (folder / "report.json").write_text(json.dumps(report))


def _connect() -> str:
    try:
        with socket.create_connection(ELSEWHERE, timeout=1):
            return "connected"
    except OSError as error:
        return type(error).__name__ if error.errno is None else os.strerror(error.errno)


def _tune(number: int) -> bytes:
    """Four seconds of notes as a wav, at another rate than the models'."""
    time = np.arange(4 * 22_050) / 22_050
    notes = ((262, 330, 392, 523), (208, 277, 185, 311))[number]
    pitch = np.array(notes)[(time * 2).astype(int) % 4]
    noise = np.random.default_rng(number).normal(0, 0.02, len(time))
    samples = 0.4 * np.sin(2 * np.pi * np.cumsum(pitch) / 22_050) + noise
    wav = io.BytesIO()
    soundfile.write(wav, samples, 22_050, format="WAV")
    return wav.getvalue()


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(argument) for argument in sys.argv[2:]])
