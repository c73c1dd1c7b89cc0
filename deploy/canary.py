"""Whether the server on this machine makes music: exit code 0 if each of its models does, 1 with the reason if not.

    python deploy/canary.py [--port 8080] [--seconds 30]

TorchServe's own /ping says Healthy even while no model can be loaded, so a tenth of a second of music is made. A model
that is too busy for that is well as long as it finishes other clips meanwhile; one that drains, or whose process has
died, is not. It is for a server without tokens (`serve --open`), whose gate asks for them: see haproxy/gate.cfg.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
import urllib.error
import urllib.request

CLIP = {"duration": 0.1, "seed": 0, "format": "wav"}
FINISHED = re.compile(r'^musicgen_audio_seconds_total\{ModelName="([^"]*)",.*\} (\S+)$', re.MULTILINE)
PAUSE = 1.0
# Whatever proxy the environment names, this machine is reached directly.
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--port", type=int, default=8080, help="of requests (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=30, help="until a model is given up (default: %(default)s)")
    args = parser.parse_args()
    try:
        models = json.loads(fetch(f"http://127.0.0.1:{args.port + 1}/models?limit=1000"))["models"]
        problems = [problem(args.port, model["modelName"], args.seconds) for model in models]
    except OSError as error:
        problems = [f"the server does not answer: {error}"]
    problems = [text for text in problems if text] if problems else ["the server has no models"]
    print("\n".join(problems) or "every model makes music")
    return 1 if problems else 0


def problem(port: int, model: str, seconds: float) -> str:
    """What is wrong with a model, empty if nothing is."""
    deadline = time.monotonic() + seconds
    before = finished(port, model)
    said = ""
    while (left := deadline - time.monotonic()) > 0:
        body = json.dumps(CLIP | {"timeout": left}).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/predictions/{model}", body, {"Content-Type": "application/json"}
        )
        try:
            audio = fetch(request, left)
            return "" if audio[:4] == b"RIFF" else f"{model}: the reply is no audio"
        except urllib.error.HTTPError as error:
            said = error.read().decode(errors="replace")
            if kind(said) not in ("busy", "deadline_exceeded"):
                break
        except TimeoutError:
            said = f"no reply for {seconds:g} s"
        if finished(port, model) > before:
            return ""
        time.sleep(min(PAUSE, max(0.0, deadline - time.monotonic())))
    return f"{model}: {said}"


def finished(port: int, model: str) -> float:
    """How many seconds of clips a model's workers have made."""
    report = fetch(f"http://127.0.0.1:{port + 2}/metrics").decode()
    return sum(float(value) for name, value in FINISHED.findall(report) if name == model)


def kind(body: str) -> str:
    try:
        return str(json.loads(body)["error"]["type"])
    except (ValueError, KeyError, TypeError):
        return ""


def fetch(what: str | urllib.request.Request, seconds: float = 10) -> bytes:
    with OPENER.open(what, timeout=seconds) as reply:
        content: bytes = reply.read()
    return content


if __name__ == "__main__":
    sys.exit(main())
