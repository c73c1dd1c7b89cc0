"""A server that answers as TorchServe's management, metrics, token and prediction APIs do, without any model."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from archive_scripts.run_folder import RunFolder


@dataclass
class StandIn:
    """What it holds.

    Attributes:
        folder: of the server it stands in for.
        versions: by variant and version, the pids of their workers; the first of a variant is its default.
        defaults: by variant.
        in_flight: requests, by worker.
        draining: the files of the draining folder at each deletion and scaling, in order.
        calls: `METHOD path`, of what changes something.
        fails: what workers of a new version print instead of loading.
    """

    folder: RunFolder
    versions: dict[tuple[str, str], list[int]] = field(default_factory=dict)
    defaults: dict[str, str] = field(default_factory=dict)
    in_flight: dict[int, int] = field(default_factory=dict)
    draining: list[set[str]] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    fails: str = ""

    def add(self, variant: str, version: str, *pids: int) -> None:
        self.versions[variant, version] = list(pids)
        self.defaults.setdefault(variant, version)

    def answer(self, method: str, path: str, query: dict[str, str]) -> tuple[int, Any]:
        parts = path.strip("/").split("/")
        if method != "GET":
            self.calls.append(f"{method} {path}")
            self.draining.append({file.name for file in (self.folder.path / "tmp" / "draining").iterdir()})
        match method, parts:
            case "GET", ["metrics"]:
                return 200, "".join(
                    f'musicgen_requests_in_flight{{ModelName="any",Worker="{pid}",Hostname="h",}} {count}.0\n'
                    for pid, count in self.in_flight.items()
                )
            case "GET", ["token"]:
                keys = keys_of("renewed", "2999-01-01")
                (self.folder.path / "key_file.json").write_text(json.dumps(keys))
                return 200, ""
            case "GET", ["models"]:
                return 200, {"models": [{"modelName": variant} for variant in self.defaults]}
            case "POST", ["models"]:
                version = query["url"].removesuffix(".mar").rpartition("@")[2]
                self.add(query["model_name"], version, 900)
                return 202, {"status": "Processing worker updates..."}
            case "POST", ["predictions", *_]:
                return 200, "RIFF"
            case _, ["models", variant, *_] if variant not in self.defaults:
                return 404, {"code": 404, "message": f"Model not found: {variant}"}
            case "GET", ["models", variant, *rest]:
                chosen = [version for name, version in self.versions if name == variant]
                return 200, [self._describe(variant, v) for v in (chosen if rest else [self.defaults[variant]])]
            case "PUT", ["models", variant, version, "set-default"]:
                self.defaults[variant] = version
                return 200, {"status": "Default version successfully updated"}
            case "PUT", ["models", variant, version]:
                pids = self.versions[variant, version]
                if self.fails:
                    log = f"W-7-{variant}_{version}-stdout MODEL_LOG - {self.fails}\n7 Worker disconnected.\n"
                    (self.folder.path / "logs" / "server.log").write_text(log)
                    self.versions[variant, version] = []
                    return 202, {"status": "Processing worker updates..."}
                count = int(query["min_worker"])
                self.versions[variant, version] = [*pids, *range(1000, 1000 + count)][:count]
                return 202, {"status": "Processing worker updates..."}
            case "DELETE", ["models", variant, version]:
                del self.versions[variant, version]
                if variant not in {name for name, _ in self.versions}:
                    del self.defaults[variant]
                return 200, {"status": "unregistered"}
        return 405, {"code": 405, "message": "not served"}

    def _describe(self, variant: str, version: str) -> dict[str, Any]:
        workers = [{"pid": pid, "status": "READY", "gpu": False} for pid in self.versions[variant, version]]
        return {
            "modelName": variant,
            "modelVersion": version,
            "modelUrl": f"{variant}@{version}.mar",
            "workers": workers,
            "jobQueueStatus": {"pendingRequests": 0},
        }


def keys_of(name: str, day: str) -> dict[str, Any]:
    """As TorchServe's key file, of tokens that expire on a day."""
    expires = f"{day}T00:00:00.123456789Z"
    scopes = ("inference", "management")
    keys: dict[str, Any] = {scope: {"key": f"{name}-{scope}", "expiration time": expires} for scope in scopes}
    return keys | {"API": {"key": "never-expires"}}


@contextmanager
def stand_in(is_open: bool = False) -> Iterator[StandIn]:
    """A server that runs; it refuses every token but those of `keys_of("fresh", …)` and `keys_of("renewed", …)`."""
    held: StandIn

    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            path = urlsplit(self.path)
            scope = "inference" if path.path.startswith("/predictions") else "management"
            good = [f"Bearer {name}-{scope}" for name in ("fresh", "renewed")] + ["Bearer never-expires"]
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if not is_open and path.path != "/metrics" and self.headers.get("Authorization") not in good:
                status, body = 400, {"code": 400, "message": "Token Authorization failed."}
            else:
                status, body = held.answer(self.command, path.path, dict(parse_qsl(path.query)))
            content = body.encode() if isinstance(body, str) else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = do_DELETE = _answer  # noqa: N815

        def log_message(self, *arguments: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        url = f"http://127.0.0.1:{server.server_port}"
        addresses = {f"{name}_address": url for name in ("inference", "management", "metrics")}
        folder = RunFolder.create(addresses | {"disable_token_authorization": str(is_open).lower()})
        (folder.path / "logs").mkdir()
        for file in ("logs/server.log", "console.log"):
            (folder.path / file).touch()
        (folder.path / "key_file.json").write_text(json.dumps(keys_of("fresh", "2999-01-01")))
        held = StandIn(folder)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield held
        finally:
            server.shutdown()
            shutil.rmtree(folder.path)
