"""Requests and replies over HTTP."""

from __future__ import annotations

import base64
import io
import json
import socket
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
import requests
import soundfile

from archive_scripts.properties import read_properties
from handler import __version__
from tests.e2e.conftest import Server, eventually
from tests.e2e.grpc_client import predict

TIMEOUT = 120


def samples_of(response: requests.Response) -> np.ndarray:
    assert response.status_code == 200, response.text
    samples, rate = soundfile.read(io.BytesIO(response.content), dtype="int16")
    assert str(rate) == response.headers["x-sample-rate"]
    return samples


def error_of(response: requests.Response) -> dict[str, Any]:
    assert response.headers["content-type"] == "application/json"
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"code", "type", "message", "field"}
    assert error["code"] == response.status_code
    return error


def test_every_form_of_body_gives_the_same_clip(server: Server) -> None:
    fields = {"prompt": "80s pop", "duration": "0.5", "seed": "7"}
    typed = {"prompt": "80s pop", "duration": 0.5, "seed": 7}
    spoken = {"input": "80s pop", "duration": 0.5, "seed": 7}
    url = server.url()
    bodies = [
        requests.post(url, json=typed, timeout=TIMEOUT),
        requests.post(url, data=fields, timeout=TIMEOUT),
        requests.post(url, files={name: (None, value) for name, value in fields.items()}, timeout=TIMEOUT),
        requests.post(server.url(path="/1.0"), json=typed, timeout=TIMEOUT),
        requests.post(
            server.url(path="/1.0/v1/audio/speech"), json={**spoken, "response_format": "wav"}, timeout=TIMEOUT
        ),
    ]
    assert all(len(samples_of(response)) == 16_000 for response in bodies)
    assert len({response.content for response in bodies}) == 1


def test_plain_text_is_the_prompt(server: Server) -> None:
    response = requests.post(
        server.url(), data="80s pop", headers={"content-type": "text/plain; charset=utf-8"}, timeout=TIMEOUT
    )
    same = server.post(prompt="80s pop", seed=int(response.headers["x-seed"]))
    assert response.headers["x-duration"] == "8.0"
    assert response.content == same.content


def test_a_player_can_open_the_play_address(server: Server) -> None:
    response = requests.get(server.url(path="/1.0/play/80s%20pop%2Frock.flac"), timeout=TIMEOUT)
    assert response.headers["content-type"] == "audio/flac"
    assert len(samples_of(response)) == 8 * 32_000


def test_an_address_is_the_same_bytes_each_time(server: Server) -> None:
    play, query = server.url(path="/1.0/play/80s%20pop.flac"), server.queried(prompt="80s pop", duration=0.5)
    for url in (play, query):
        first, again = (requests.get(url, timeout=TIMEOUT) for _ in range(2))
        assert first.status_code == 200, first.text
        assert first.content == again.content
        assert first.headers["x-seed"] == again.headers["x-seed"]
        assert int(first.headers["x-seed"]) < 2**53
    with_seed = requests.get(query, params={"seed": first.headers["x-seed"]}, timeout=TIMEOUT)
    assert with_seed.content == first.content


def test_a_query_is_a_whole_request_at_every_address_that_takes_one(server: Server) -> None:
    fields = {"prompt": "été & 100% pop", "duration": "0.5", "seed": "7", "format": "flac", "stream": "false"}
    expected = server.post(prompt="été & 100% pop", duration=0.5, seed=7, format="flac").content
    root = server.torchserve.url
    for path in ("/tiny/predict", "/tiny/1.0/predict", "/models/tiny/invoke", "/invocations?model_name=tiny"):
        for method in ("GET", "POST"):
            reply = requests.request(method, root + path, params=fields, timeout=TIMEOUT)
            assert (reply.status_code, reply.content == expected) == (200, True), (method, path)
        described = requests.get(root + path, timeout=TIMEOUT).json()
        assert described["variant"] == "tiny", path
    plus = f"{root}/tiny/predict?prompt=slow+blues&duration=0.5&seed=7"
    assert requests.get(plus, timeout=TIMEOUT).content == server.post(prompt="slow blues", duration=0.5, seed=7).content
    beside = requests.post(server.queried(seed=7), json={"prompt": "slow blues", "duration": 0.5}, timeout=TIMEOUT)
    assert beside.content == requests.get(plus, timeout=TIMEOUT).content


def test_a_query_streams(server: Server) -> None:
    url = server.queried(prompt="80s pop", duration=4, seed=3, format="pcm", stream="true", normalization="none")
    reply = requests.get(url, timeout=TIMEOUT, stream=True)
    pieces = list(reply.iter_content(None))
    assert reply.status_code == 200
    assert len(pieces) >= 4
    whole = server.post(prompt="80s pop", duration=4, seed=3, format="pcm", normalization="none")
    assert b"".join(pieces) == whole.content


def test_a_query_that_is_wrong_names_its_field_and_no_header_passes_for_a_path(server: Server) -> None:
    for query, field in (
        ({"prompts": "x"}, "prompts"),
        ({"duration": "1e9"}, "duration"),
        ({"stream": "maybe"}, "stream"),
    ):
        assert error_of(requests.get(server.queried(**query), timeout=TIMEOUT))["field"] == field
    forged = {"url_path": "cancel", "x-request-id": "mine"}
    reply = requests.get(server.queried(duration=0.2, seed=1), headers=forged, timeout=TIMEOUT)
    assert reply.content == server.post(duration=0.2, seed=1).content
    for name in ("url_path", "URL_PATH"):
        assert requests.get(server.url(), headers={name: "v1/models"}, timeout=TIMEOUT).json()["variant"] == "tiny"


def test_a_part_of_a_clip_is_answered_with_the_whole_and_the_reply_says_so(server: Server) -> None:
    url = server.queried(duration=0.5, seed=7)
    whole, part = (requests.get(url, headers=headers, timeout=TIMEOUT) for headers in ({}, {"range": "bytes=100-200"}))
    assert (part.status_code, part.content) == (200, whole.content)
    assert part.headers["accept-ranges"] == "none"


@pytest.mark.parametrize(
    ("audio_format", "rate"), [("wav", 32_000), ("flac", 32_000), ("ogg", 48_000), ("opus", 48_000), ("mp3", 32_000)]
)
def test_every_audio_format_decodes_to_the_length_asked_for(server: Server, audio_format: str, rate: int) -> None:
    first, second = (server.post(duration=1.5, seed=1, format=audio_format) for _ in range(2))
    samples = samples_of(first)
    assert len(samples) == 1.5 * rate
    assert first.headers["x-sample-rate"] == str(rate)
    assert first.headers["x-duration"] == "1.5"
    assert first.headers["x-variant"] == "tiny"
    assert first.content == second.content


def test_the_sample_rate_is_the_one_asked_for(server: Server) -> None:
    for fields in ({"sample_rate": 8_000}, {"sample_rate": 44_100, "format": "mp3"}, {"sample_rate": 24_000}):
        response = server.post(duration=1, seed=1, **fields)
        assert len(samples_of(response)) == fields["sample_rate"]
        assert response.headers["x-duration"] == "1.0"


def test_a_browser_s_form_may_leave_fields_empty(server: Server) -> None:
    parts = ["prompt", "seed", "format", "sample_rate", "melody", "continuation_end", "top_k"]
    lines = [f'--x\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n\r\n' for name in parts]
    lines += [
        f'--x\r\nContent-Disposition: form-data; name="{name}"; filename=""\r\n'
        "Content-Type: application/octet-stream\r\n\r\n\r\n"
        for name in ("continuation", "style")
    ]
    lines += ['--x\r\nContent-Disposition: form-data; name="duration"\r\n\r\n0.5\r\n', "--x--\r\n"]
    headers = {"content-type": "multipart/form-data; boundary=x"}
    response = requests.post(server.url(), data="".join(lines), headers=headers, timeout=TIMEOUT)
    assert len(samples_of(response)) == 16_000
    assert response.content == server.post(duration=0.5, seed=int(response.headers["x-seed"])).content


def test_replicate_s_input_is_taken(server: Server) -> None:
    clip = server.post(duration=1, seed=3)
    audio = base64.b64encode(clip.content).decode()
    wanted = {"prompt": "80s pop", "duration": 1.5, "seed": 4, "continuation_end": -1}
    replicate = {**wanted, "model_version": "large", "input_audio": audio, "continuation": True, "output_format": "mp3"}
    response = server.post(input=replicate)
    assert response.headers["x-no-effect"] == "model_version"
    assert response.content == server.post(**wanted, continuation=audio, format="mp3").content


def test_pcm_and_json_hold_the_samples_of_the_wav(server: Server) -> None:
    wav, pcm, in_json = (server.post(duration=1, seed=1, format=name) for name in ("wav", "pcm", "json"))
    samples = samples_of(wav)
    assert pcm.content == samples.tobytes()
    assert base64.b64decode(in_json.json()["audio"]) == wav.content
    assert in_json.json()["seed"] == 1


def test_a_drawn_seed_is_reported_and_gives_the_clip_again(server: Server) -> None:
    first = server.post(duration=0.5)
    again = server.post(duration=0.5, seed=int(first.headers["x-seed"]))
    other = server.post(duration=0.5)
    assert first.content == again.content != other.content


@pytest.mark.parametrize("how", ["upload", "base64", "form"])
def test_a_clip_is_continued(server: Server, how: str) -> None:
    clip = server.post(duration=1, seed=3, normalization="none").content
    text = base64.b64encode(clip).decode()
    fields: dict[str, Any] = {"duration": 1.5, "continuation_start": 0.25, "continuation_end": 0.75, "seed": 4}
    if how == "upload":
        response = requests.post(server.url(), data=fields, files={"continuation": clip}, timeout=TIMEOUT)
    elif how == "form":
        response = requests.post(server.url(), data={**fields, "continuation": text}, timeout=TIMEOUT)
    else:
        response = server.post(**fields, continuation=text)
    assert len(samples_of(response)) == 48_000
    assert response.content == server.post(**fields, continuation=text).content
    assert response.content != server.post(duration=1.5, seed=4).content


def test_a_reply_longer_than_a_message_may_be_arrives_whole(server: Server) -> None:
    response = server.post(duration=110, use_sampling=False, format="json", normalization="peak")
    assert len(response.content) > 9_000_000
    samples, _ = soundfile.read(io.BytesIO(base64.b64decode(response.json()["audio"])))
    assert len(samples) == 110 * 32_000


def test_the_model_describes_itself_at_both_addresses(server: Server) -> None:
    description = requests.get(server.url(), timeout=TIMEOUT).json()
    assert description["variant"] == "tiny"
    assert description["conditioners"] == ["description"]
    assert (description["sample_rate"], description["channels"], description["frame_rate"]) == (32_000, 1, 50.0)
    assert description["max_duration"] == description["fields"]["duration"]["maximum"] == 120
    assert (description["window"], description["device"], description["dtype"]) == (30, "cpu", "float32")
    assert description["version"] == __version__
    assert not {"melody", "style", "eval_q", "excerpt_length", "ds_factor"} & set(description["fields"])
    assert description["formats"] == ["wav", "flac", "mp3", "ogg", "opus", "aac", "pcm", "json"]
    assert description["fields"]["sample_rate"]["enum"] == [8000, 16000, 22050, 24000, 32000, 44100, 48000]
    [managed] = requests.get(f"{server.management}/models/tiny?customized=true", timeout=TIMEOUT).json()
    assert managed["customizedMetadata"] == description


@pytest.mark.parametrize(
    ("fields", "status", "field"),
    [
        ({"duration": 1000}, 400, "duration"),
        ({"prompts": "x"}, 400, "prompts"),
        ({"prompt": "word " * 600}, 400, "prompt"),
        ({"prompt": "x", "text": "x"}, 400, "prompt"),
        ({"prompt": "\ud800"}, 400, "prompt"),
        ({"duration": float("nan")}, 400, "duration"),
        ({"continuation": "????"}, 400, "continuation"),
        ({"stream": True, "format": "json"}, 400, "format"),
        ({"eval_q": 3}, 400, "eval_q"),
        ({"melody": "????"}, 400, "melody"),
    ],
)
def test_an_error_names_its_field(server: Server, fields: dict[str, Any], status: int, field: str) -> None:
    response = requests.post(
        server.url(), data=json.dumps(fields), headers={"content-type": "application/json"}, timeout=TIMEOUT
    )
    assert response.status_code == status
    assert error_of(response)["field"] == field


@pytest.mark.parametrize(
    ("body", "content_type", "status"),
    [
        (b'{"prompt": ', "application/json", 400),
        (b"", "application/json", 400),
        (b"[" * 50_000, "application/json", 400),
        (b'{"seed": 1' + b"0" * 5000 + b"}", "application/json", 400),
        (b"80s pop", "application/x-www-form-urlencoded", 400),
        (b"RIFF", "audio/wav", 415),
        (b"\xff\xfe", "text/plain", 400),
    ],
)
def test_a_body_that_cannot_be_read_is_an_error(server: Server, body: bytes, content_type: str, status: int) -> None:
    response = requests.post(server.url(), data=body, headers={"content-type": content_type}, timeout=TIMEOUT)
    assert response.status_code == status
    error_of(response)


def test_an_unknown_path_is_an_error(server: Server) -> None:
    assert error_of(requests.get(server.url(path="/1.0/nothing"), timeout=TIMEOUT))["code"] == 404


def test_odd_header_bytes_do_no_harm(server: Server) -> None:
    address = urlsplit(server.url())
    with socket.create_connection((str(address.hostname), int(address.port or 0)), timeout=TIMEOUT) as connection:
        connection.sendall(
            f"GET {address.path} HTTP/1.1\r\nHost: x\r\nX-Odd: ".encode()
            + b"\xff\xfe\xe9\r\nX-Request-Id: \xff\r\ndescribe: true\r\nConnection: close\r\n\r\n"
        )
        assert connection.recv(12) == b"HTTP/1.1 200"


def test_over_grpc_a_clip_comes_in_one_message_and_one_too_long_for_the_client_is_refused_unmade(
    server: Server,
) -> None:
    port = int(read_properties(server.torchserve.folder / "config.properties")["grpc_inference_port"])
    assert predict(port, "tiny", {"duration": "0.5", "seed": "1"}) == server.post(duration=0.5, seed=1).content

    def made() -> float:
        return sum(server.measured("musicgen_audio_seconds_total").values())

    before = made()
    for fields in ({"duration": "66"}, {"duration": "60", "format": "json"}, {"duration": "1", "stream": "true"}):
        error = json.loads(predict(port, "tiny", fields))["error"]  # TorchServe loses the status
        assert (error["code"], error["field"]) == (400, "stream" if "stream" in fields else "duration")
    mp3 = predict(port, "tiny", {"duration": "2", "seed": "1", "format": "mp3"})
    assert mp3 == server.post(duration=2, seed=1, format="mp3").content
    eventually(lambda: made() >= before + 4)
    assert made() < before + 10
