"""What FFmpeg does not tell about an audio file's bytes: the tags between its frames, and whether it was cut off."""

from __future__ import annotations

_ANOTHER = "another file follows in it; send one of them, or convert them to one file"
_MOST_JUNK = 4096  # bytes behind a wav's samples that are no chunk, and cannot be many samples
_OPEN_ENDED = 0x7FFF_F000  # a wav's size from here on means "unknown": the writer could not go back
_TAGS = (b"ID3", b"TAG", b"APETAGEX", b"LYRICSBEGIN", b"3DI")


def id3_size(data: bytes, place: int = 0) -> int:
    """Bytes of the ID3v2 tag at a place in a file; 0: there is none."""
    head = data[place : place + 10]
    if len(head) < 10 or head[:3] != b"ID3" or head[3] > 4 or head[5] & 0xF or max(head[6:]) > 127:
        return 0
    return 10 + (head[6] << 21 | head[7] << 14 | head[8] << 7 | head[9]) + 10 * (head[5] >> 4 & 1)


def without_tags(data: bytes) -> bytes:
    """The frames of an mp3 or aac file without the tags between them, where files were joined.

    A tag with a picture has bytes that look like frames.
    """
    if len(data) < 2 or data[0] != 0xFF or data[1] < 0xE0:
        return data
    pieces, kept, place = [], 0, data.find(b"ID3")
    while place >= 0:
        after = place + id3_size(data, place)
        if after > place and (after >= len(data) or data[after] == 0xFF or data[after : after + 3] in (b"ID3", b"TAG")):
            title = place - 128 if place >= kept + 128 and data[place - 128 : place - 125] == b"TAG" else place
            pieces.append(data[kept:title])
            kept = after
        place = data.find(b"ID3", max(after, place + 3))
    return b"".join([*pieces, data[kept:]]) if pieces else data


def is_tag(content: bytes) -> bool:
    return content.startswith(_TAGS) or not content.strip(b"\0")


def mp3_frames(head: bytes) -> int | None:
    """The number of frames that the Xing, Info or VBRI header in the frame before the first with music tells of."""
    near = head[-2881:]
    place = max(near.rfind(b"Xing"), near.rfind(b"Info"))
    if place >= 0 and len(near) >= place + 12 and near[place + 7] & 1:
        return int.from_bytes(near[place + 8 : place + 12], "big") or None
    place = near.rfind(b"VBRI")
    return int.from_bytes(near[place + 14 : place + 18], "big") or None if place >= 0 else None


_KILOBITS = {  # of MPEG 1 and of MPEG 2, layer III
    True: (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    False: (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}


def mp3_frame_size(frame: bytes) -> int:
    """Bytes of an MPEG layer III frame by its header (ISO 11172-3, 2.4.2.3); 0 where that does not say."""
    if len(frame) < 4 or frame[0] != 0xFF or frame[1] & 0xE6 != 0xE2:
        return 0
    version, bits, rate = frame[1] >> 3 & 3, frame[2] >> 4, frame[2] >> 2 & 3
    if bits in (0, 15) or rate == 3 or version == 1:
        return 0
    first = version == 3
    sample_rate = (44_100, 48_000, 32_000)[rate] >> (0, 1, 2)[(3, 2, 0).index(version)]
    return (144 if first else 72) * _KILOBITS[first][bits] * 1000 // sample_rate + (frame[2] >> 1 & 1)


def wav_is_cut(data: bytes) -> str | None:
    """A wav's chunks say how long they are. FFmpeg takes what is there, and reads no further than the first samples."""
    long_size, place, samples_end = None, 12, 0
    while place + 8 <= len(data):
        name, size = data[place : place + 4], int.from_bytes(data[place + 4 : place + 8], "little")
        there = len(data) - place - 8
        is_file = name in (b"RIFF", b"RF64") or name == b"data"
        if samples_end and (is_file or (size > there + 1 and there > _MOST_JUNK)):
            return f"{len(data) - samples_end} bytes follow the samples that its header tells of"
        if name == b"ds64":
            long_size = int.from_bytes(data[place + 16 : place + 24], "little")
        if name == b"data":
            size = long_size if size == 0xFFFFFFFF and long_size is not None else size
            if there < size:
                return f"its header tells of {size} bytes, {there} are there" if size < _OPEN_ENDED else None
            if size == 0:
                return None  # not known: what follows are the samples
            samples_end = place + 8 + size
        place += 8 + size + size % 2
    return None


def with_sizes(data: bytes) -> bytes:
    """An aiff or RF64 file with the sizes that its writer left at 0, since it could not go back; others as they are."""
    if data[:4] == b"FORM" and data[8:12] in (b"AIFF", b"AIFC"):
        return _with_aiff_sizes(bytearray(data))
    if data[:4] == b"RF64" and data[12:16] == b"ds64" and not any(data[28:36]):
        place = data.find(b"data", 16)
        size = len(data) - place - 8
        return data[:28] + size.to_bytes(8, "little") + data[36:] if place > 0 and size > 0 else data
    return data


def _with_aiff_sizes(data: bytearray) -> bytes:
    place, common = 12, 0
    while place + 8 <= len(data):
        name, size = bytes(data[place : place + 4]), int.from_bytes(data[place + 4 : place + 8], "big")
        if name == b"COMM":
            common = place + 8
            size = size or (18 if data[8:12] == b"AIFF" else 24)
        if name == b"SSND" and size == 0 and common:
            size = len(data) - place - 8
            channels, sample_bytes = int.from_bytes(data[common : common + 2], "big"), (data[common + 7] + 7) // 8
            frame = channels * sample_bytes
            data[place + 4 : place + 8] = size.to_bytes(4, "big")
            data[common + 2 : common + 6] = max(0, (size - 8) // frame if frame else 0).to_bytes(4, "big")
            data[4:8] = (len(data) - 8).to_bytes(4, "big")
        place += 8 + size + size % 2
    return bytes(data)


def aiff_is_joined(data: bytes) -> str | None:
    size = int.from_bytes(data[4:8], "big")
    return _ANOTHER if data[8 + size + size % 2 :][:4] == b"FORM" else None


def caf_is_joined(data: bytes) -> str | None:
    place = 8
    while place + 12 <= len(data):
        if data[place : place + 4] == b"caff":
            return _ANOTHER
        size = int.from_bytes(data[place + 4 : place + 12], "big", signed=True)
        if size < 0:
            return None  # the samples go on to the end
        place += 12 + size
    return None


def mp4_is_joined(data: bytes) -> str | None:
    place = 0
    while place + 8 <= len(data):
        if place and data[place + 4 : place + 8] == b"ftyp":
            return _ANOTHER
        size = int.from_bytes(data[place : place + 4], "big")
        if size == 1:
            size = int.from_bytes(data[place + 8 : place + 16], "big")
        if size < 8:
            return None  # the last box goes on to the end
        place += size
    return None


def without_flac_tail(data: bytes) -> bytes:
    """A flac file without the ID3v1 tag or the zeros that some programs put behind it.

    FFmpeg takes them for a part of the last frame. Of a frame itself only a last byte or two can be zero.
    """
    if data[-128:-125] == b"TAG":
        data = data[:-128]
    kept = data.rstrip(b"\0")
    return kept if len(data) - len(kept) > 3 else data


def ogg_is_cut(data: bytes) -> str | None:
    """An ogg without its end-of-stream flag may be whole; one that ends within a page or a packet is not."""
    place, pages = data.find(b"OggS"), dict[bytes, int]()
    continued = False
    while place >= 0:
        head = data[place : place + 27]
        segments = data[place + 27 : place + 27 + head[26]] if len(head) == 27 else b""
        size = 27 + len(segments) + sum(segments)
        if len(head) < 27 or len(segments) < head[26] or len(data) < place + size:
            return "it ends within a page"
        serial, number = head[14:18], int.from_bytes(head[18:22], "little")
        if not head[5] & 2 and number != pages.get(serial, number - 1) + 1:
            return "pages are missing"
        pages[serial] = number
        continued = bool(segments) and segments[-1] == 255 and not head[5] & 4
        place = data.find(b"OggS", place + size)
    return "it ends within a packet" if continued else None
