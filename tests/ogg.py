"""Ogg pages, for tests that change one by hand."""

from __future__ import annotations

import zlib

_REVERSED_BITS = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def ogg_checksum(page: bytes | bytearray) -> int:
    """CRC-32 with polynomial 0x04c11db7, most significant bit first, no inversion (RFC 3533).

    It is zlib's CRC with every byte and the result mirrored, and zlib's two inversions undone.
    """
    mirrored = zlib.crc32(page.translate(_REVERSED_BITS), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{mirrored:032b}"[::-1], 2)
