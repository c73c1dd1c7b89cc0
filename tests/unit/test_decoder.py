"""Uploads are decoded in a process of its own: what happens to it is one request's error and nobody else's."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import psutil
import pytest

from handler import decoder as decoder_module
from handler.decoder import Decoder, DecoderLostError, Decoders, DecodingAbandonedError, FileRefusedError
from handler.errors import RequestError
from handler.upload import open_upload
from tests.audio_files import KINDS, encode, noise

pytestmark = pytest.mark.faults

GOOD = encode(KINDS["mp3 with Info"], noise(32_000, 2), 32_000)


@pytest.fixture
def decoder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Decoder]:
    """One whose process does what a file says."""
    monkeypatch.setattr(decoder_module, "PROGRAM", "tests.faulty_decoder")
    decoder = Decoder()
    yield decoder
    decoder.close()


def length(decoder: Decoder, data: bytes = GOOD) -> int:
    decoding = decoder.open(data, None, None, 10.0)
    return sum(len(block.samples) for block in decoding)


@pytest.mark.parametrize("how", ["crash", "abort", "garbled"])
def test_a_file_that_kills_the_decoder_is_refused_and_the_next_is_read(decoder: Decoder, how: str) -> None:
    assert length(decoder) == 32_000
    pid = decoder.pid
    with pytest.raises(FileRefusedError, match="died of it"):
        length(decoder, how.encode())
    assert length(decoder) == 32_000
    assert decoder.pid != pid


def test_a_dead_decoder_names_the_field_of_its_request(decoder: Decoder) -> None:
    with pytest.raises(RequestError, match="convert it to wav or flac first") as caught:
        open_upload(b"crash", "style", 100, 0.02, 10).read(decoder)
    assert caught.value.field == "style"


def test_a_file_that_takes_all_memory_is_refused(decoder: Decoder) -> None:
    assert length(decoder) == 32_000
    assert decoder.pid is not None
    before = psutil.Process(decoder.pid).memory_info().rss
    with pytest.raises(FileRefusedError, match="takes more memory than a file may"):
        length(decoder, b"memory")
    assert length(decoder) == 32_000
    assert psutil.Process(decoder.pid).memory_info().rss < before + 2**25


def test_a_file_that_takes_all_time_is_refused(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder_module, "_CPU_SECONDS", 1.0)
    with pytest.raises(FileRefusedError, match="takes too long"):
        length(decoder, b"spin")
    assert length(decoder) == 32_000


def test_a_file_that_hangs_is_refused(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(decoder_module, "_WALL_FACTOR", 0.05)
        with pytest.raises(FileRefusedError, match="takes too long"):
            length(decoder, b"sleep")
    assert length(decoder) == 32_000


def test_a_file_that_nobody_waits_for_is_given_up_at_once(decoder: Decoder) -> None:
    started = time.monotonic()
    with pytest.raises(DecodingAbandonedError):
        decoder.open(b"sleep", None, None, 600.0, lambda: time.monotonic() < started + 0.3)
    assert time.monotonic() < started + 5
    assert length(decoder) == 32_000


@pytest.mark.parametrize("how", ["open", "connect"])
def test_the_decoder_can_open_no_file_and_no_socket(decoder: Decoder, how: str) -> None:
    with pytest.raises(FileRefusedError, match="Too many open files"):
        length(decoder, how.encode())


def test_a_decoder_that_ends_for_another_reason_than_its_file_is_no_fault_of_the_file(decoder: Decoder) -> None:
    with pytest.raises(DecoderLostError):
        length(decoder, b"exit")
    assert length(decoder) == 32_000


def test_a_decoder_killed_while_it_is_idle_is_replaced_unnoticed() -> None:
    decoder = Decoder()
    assert length(decoder) == 32_000
    assert decoder.pid is not None
    os.kill(decoder.pid, signal.SIGKILL)
    assert length(decoder) == 32_000
    decoder.close()


def test_a_decoder_that_cannot_be_started_is_no_fault_of_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(DecoderLostError, match="cannot be started"):
        length(Decoder())


def test_the_decoder_holds_no_secret_no_torch_and_nothing_but_its_pipes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "a secret of the environment")
    decoder = Decoder()
    with open("/etc/passwd") as held:
        os.set_inheritable(held.fileno(), True)
        assert length(decoder) == 32_000
    process = psutil.Process(decoder.pid)
    assert "HF_TOKEN" not in process.environ()
    assert not any("torch" in each.path for each in process.memory_maps())
    assert {int(each) for each in os.listdir(f"/proc/{process.pid}/fd")} == {0, 1, 2}
    assert process.num_threads() == 1
    assert process.memory_info().rss < 100 * 2**20
    for limit, bound in ((resource.RLIMIT_CORE, 0), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_NOFILE, 3)):
        assert process.rlimit(limit)[1] == bound
    assert process.rlimit(resource.RLIMIT_AS)[0] < 2**30
    assert 0 < process.rlimit(resource.RLIMIT_CPU)[0] < 60
    decoder.close()
    assert not psutil.pid_exists(process.pid)


def test_the_decoder_s_program_imports_no_torch() -> None:
    code = "import sys, handler.decoder_process; print(sorted({name.partition('.')[0] for name in sys.modules}))"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "'av'" in modules
    assert "torch" not in modules


def test_the_decoder_leaves_when_its_worker_is_killed() -> None:
    code = (
        "import sys, time; from handler.decoder import Decoder; decoder = Decoder();"
        "decoder.open(open(sys.argv[1], 'rb').read(), None, None, 10.0);"
        "print(decoder.pid, flush=True); time.sleep(600)"
    )
    file = "tests/cases/audio/phone_aac.m4a"
    with subprocess.Popen([sys.executable, "-c", code, file], stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout is not None
        process = psutil.Process(int(worker.stdout.readline()))
        worker.kill()
    psutil.wait_procs([process], timeout=10)
    assert not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("how", [signal.SIGSEGV, signal.SIGABRT, signal.SIGXCPU, signal.SIGKILL])
def test_a_decoder_that_dies_while_it_is_idle_costs_no_file(decoder: Decoder, how: signal.Signals) -> None:
    assert length(decoder) == 32_000
    assert decoder.pid is not None
    process = psutil.Process(decoder.pid)
    process.send_signal(how)
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    assert length(decoder) == 32_000


def test_there_are_no_more_decoders_than_files_at_once() -> None:
    decoders = Decoders()
    with decoders.one() as first, decoders.one() as second:
        assert first is not second
        assert length(first) == length(second) == 32_000
        pids = {first.pid, second.pid}
    with decoders.one() as again, decoders.one() as other:
        assert {again.pid, other.pid} == pids
        again.close()
        other.close()
    assert not any(psutil.pid_exists(pid) for pid in pids if pid is not None)
