"""Damage to files, from a fixed seed: what disks, transfers, editors and people with time do to them."""

import random
from collections.abc import Iterator

PIECES = (
    b"\x00",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"\r\n",
    b"\x1b[2J",
    b"NaN",
    b"1e999",
    b"-1",
    b"9" * 400,
    b'"',
    b"{",
    b"]",
    b"null",
    b"true",
    b"\\ud800",
    b"<script>",
    b"[" * 3000,
    b"&a [*a]",
    b": ",
    b"!!python/name:os.system ",
    b"../../x",
    b"\xe2\x80\xae",
)


def mutations(raw: bytes, count: int, seed: int) -> Iterator[bytes]:
    """`count` versions of `raw`, each damaged once in one of nine ways."""
    r = random.Random(f"{seed}/{len(raw)}")
    ways = (_cut, _flipped, _flipped, _flipped, _overwritten, _removed, _doubled, _inserted, _digit, _spliced)
    for number in range(count):
        yield ways[number % len(ways)](raw, r)


def _cut(raw: bytes, r: random.Random) -> bytes:
    return raw[: r.choice([0, 1, 7, 8, r.randrange(len(raw)), len(raw) - 1])]


def _flipped(raw: bytes, r: random.Random) -> bytes:
    place = r.choice([r.randrange(len(raw)), r.randrange(min(len(raw), 600))])
    return raw[:place] + bytes([raw[place] ^ (1 << r.randrange(8))]) + raw[place + 1 :]


def _overwritten(raw: bytes, r: random.Random) -> bytes:
    start, length = r.randrange(len(raw)), r.choice([1, 4, 8, 64])
    return raw[:start] + r.choice([b"\0", b"\xff", b"9", b" "]) * length + raw[start + length :]


def _removed(raw: bytes, r: random.Random) -> bytes:
    start = r.randrange(len(raw))
    end = r.choice([start + 1, start + 8, raw.find(b"\n", start) + 1 or len(raw)])
    return raw[:start] + raw[end:]


def _doubled(raw: bytes, r: random.Random) -> bytes:
    start = raw.rfind(b"\n", 0, r.randrange(len(raw))) + 1
    end = raw.find(b"\n", start) + 1 or len(raw)
    return raw[:end] + raw[start:end] + raw[end:]


def _inserted(raw: bytes, r: random.Random) -> bytes:
    place = r.randrange(min(len(raw), 4000) + 1)
    return raw[:place] + r.choice(PIECES) + raw[place:]


def _digit(raw: bytes, r: random.Random) -> bytes:
    digits = [place for place, byte in enumerate(raw[:20000]) if 48 <= byte <= 57]
    if not digits:
        return _flipped(raw, r)
    place = r.choice(digits)
    return raw[:place] + str(r.randrange(10)).encode() + raw[place + 1 :]


def _spliced(raw: bytes, r: random.Random) -> bytes:
    one, other = sorted(r.randrange(len(raw)) for _ in range(2))
    return raw[:one] + raw[other:] + raw[one:other]
