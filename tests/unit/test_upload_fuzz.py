"""Mutated files of every format: each is read or refused, and neither the worker nor its memory is hurt.

The long run is no part of the suite: `python -m pytest -m load tests/unit/test_upload_fuzz.py -s` prints its figures.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

import psutil
import pytest

from handler.decoder import Decoder
from handler.errors import RequestError
from handler.upload import open_upload
from tests.audio_files import CASES, ID3V1, KINDS, encode, id3_tag, noise

pytestmark = pytest.mark.faults

LONG = 10_000
MEBIBYTE = 2**20


def originals() -> list[bytes]:
    generated = [encode(kind, noise(9_600, 2), 48_000) for kind in KINDS.values()]
    return [*generated, *(path.read_bytes() for path in sorted(CASES.iterdir()))]


FILES = originals()


def mutated(number: int) -> bytes:
    """The file of a number: one of the originals with bits flipped, pieces cut, spliced, repeated or headers edited."""
    chosen = random.Random(number)
    data = bytearray(FILES[number % len(FILES)])
    for _ in range(chosen.randint(1, 4)):
        place = chosen.randrange(len(data)) if len(data) else 0
        head = chosen.randrange(min(200, len(data))) if len(data) else 0
        size = chosen.choice((1, 4, 30, 500, 5_000))
        match chosen.randrange(9):
            case 0:
                for _ in range(chosen.choice((1, 10, 200))):
                    if data:
                        data[chosen.randrange(len(data))] ^= 1 << chosen.randrange(8)
            case 1:
                del data[place:]
            case 2:
                del data[place : place + size]
            case 3:
                data[place:place] = chosen.randbytes(size)
            case 4:
                other = FILES[chosen.randrange(len(FILES))]
                start = chosen.randrange(len(other))
                data[place:] = other[start:]
            case 5:
                data[place:place] = data[place : place + size] * chosen.randint(1, 20)
            case 6:
                data[head : head + 4] = chosen.choice((b"\xff" * 4, bytes(4), b"\x7f\xff\xff\xff", b"\x80\0\0\0"))
            case 7:
                data[head : head + 1] = chosen.randbytes(1)
            case 8:
                data[0:0] = chosen.choice((ID3V1, id3_tag(chosen.randbytes(size)), chosen.randbytes(size)))
    return bytes(data)


@dataclass
class Figures:
    """What became of files.

    Attributes:
        replies: how many were read, and how many refused with the first words of which message.
        decoders: how many processes it took.
        memory: MiB of this process and of the decoder, after so many files.
    """

    replies: Counter[str] = field(default_factory=Counter)
    decoders: set[int] = field(default_factory=set)
    memory: dict[int, tuple[float, float]] = field(default_factory=dict)


def run(numbers: range, marks: tuple[int, ...]) -> Figures:
    decoder, figures, own = Decoder(), Figures(), psutil.Process()
    for done, number in enumerate(numbers, 1):
        refused: RequestError | None = None
        try:
            # At the file's own rate: oneDNN keeps a resampling kernel for each of the last 1,024 lengths, and that
            # memory has nothing to do with reading.
            sound = open_upload(mutated(number), "melody", 2**22, 0.02, 30.0).read(decoder)
            assert 0.02 <= sound.seconds <= 30.0
            assert sound.wav().isfinite().all()
            figures.replies["read"] += 1
        except RequestError as error:
            refused = error
        if refused is not None:
            assert refused.field == "melody"
            assert 0 < len(refused.message) < 500
            figures.replies[" ".join(refused.message.split()[:5])] += 1
        if decoder.pid is not None:
            figures.decoders.add(decoder.pid)
            if done in marks:
                theirs = psutil.Process(decoder.pid)
                figures.memory[done] = (own.memory_info().rss / MEBIBYTE, theirs.memory_info().rss / MEBIBYTE)
    decoder.close()
    return figures


def test_hundreds_of_mutated_files_are_read_or_refused() -> None:
    figures = run(range(LONG, LONG + 600), (300, 600))
    assert figures.replies["read"] > 30
    assert figures.replies.total() == 600
    assert figures.memory[600][0] < figures.memory[300][0] + 64


@pytest.mark.load
@pytest.mark.timeout(3600)
def test_ten_thousand_mutated_files_are_read_or_refused_with_memory_flat() -> None:
    figures = run(range(LONG), (1_000, 5_000, LONG))
    print(f"\n{figures.replies.total()} files, {len(figures.decoders)} decoders; MiB here and there: {figures.memory}")
    for message, count in figures.replies.most_common(40):
        print(f"{count:6} {message}")
    first, last = figures.memory[1_000], figures.memory[LONG]
    assert last[0] < first[0] + 32
    assert last[1] < first[1] + 64
