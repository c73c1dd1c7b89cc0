"""Asking a running server for a clip."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any

from archive_scripts.errors import CommandError
from archive_scripts.run_folder import RunFolder


def generate(
    server: RunFolder, model: str, request: Mapping[str, Any], seconds: float
) -> tuple[bytes, Mapping[str, str]]:
    """One prediction: the reply's body and headers.

    Args:
        model: its name, or `<name>/<version>`.
        request: its fields.
        seconds: to wait for the reply.

    Raises:
        CommandError: the server's answer is an error, or none.
    """
    url = f"{server.inference}/predictions/{model}"
    try:
        headers = {"Content-Type": "application/json"} | server.authorization("inference")
        asked = urllib.request.Request(url, json.dumps(request).encode(), headers)
        with urllib.request.urlopen(asked, timeout=seconds) as reply:
            return reply.read(), dict(reply.headers)
    except urllib.error.HTTPError as error:
        answer = error.read().decode(errors="replace")
        raise CommandError(f"{url} answered {error.code}: {answer}") from error
    except OSError as error:
        raise CommandError(f"{url} did not answer: {error}") from error
