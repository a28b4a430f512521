"""Text as UTF-8 bytes, each written as a printable character, for byte-level BPE (Wang et al. 2019, "Neural Machine
Translation with Byte-Level Subwords").

The characters are those of icefall and sherpa-onnx: ASCII stands for itself, other bytes for Latin letters from U+0100
on. A space stays a space, and nothing else becomes one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain

# ranges of letters that no normalisation takes apart or joins (first and last)
_LATIN = ((0x0100, 0x0131), (0x0134, 0x013E), (0x0141, 0x0148), (0x014A, 0x017E), (0x0180, 0x01A6))
_ASCII = range(0x20, 0x7F)


def _symbols() -> list[str]:
    latin = iter(chain.from_iterable(range(first, last + 1) for first, last in _LATIN))
    return [chr(byte if byte in _ASCII else next(latin)) for byte in range(256)]


BYTE_SYMBOLS: list[str] = _symbols()
"""The character that each byte is written as."""
_BYTES = {symbol: byte for byte, symbol in enumerate(BYTE_SYMBOLS)}


def write_bytes(text: str) -> str:
    """A text with its UTF-8 bytes as characters. Raises UnicodeEncodeError for half a surrogate pair."""
    return "".join(BYTE_SYMBOLS[byte] for byte in text.encode("utf-8"))


def read_bytes(written: str) -> bytes:
    """The bytes of what ``write_bytes`` wrote, or of a part of it. Raises KeyError for another character."""
    return bytes(_BYTES[symbol] for symbol in written)


def is_inside(written: str) -> bool:
    """Whether a part begins within a character: with a byte that continues one."""
    return bool(written) and 0x80 <= _BYTES.get(written[0], 0) < 0xC0


def recover(parts: Iterable[bytes]) -> list[tuple[str, Sequence[int]]]:
    """The characters that bytes spell, each with the numbers of the parts that its bytes are in; bytes that belong to
    none are dropped.

    These are as many characters as can be had, the optimum of equation 1 of Wang et al. 2019: whether a character
    begins at a byte, and how far it goes, depends on that byte and those behind it alone, and no byte can be in two
    characters. So there is nothing to choose, and their dynamic programming finds the same.
    """
    found: list[tuple[str, Sequence[int]]] = []
    data = [(byte, number) for number, part in enumerate(parts) for byte in part]
    start = 0
    while start < len(data):
        first = data[start][0]
        size = 1 if first < 0x80 else 2 if first < 0xE0 else 3 if first < 0xF0 else 4
        window = data[start : start + size]
        try:
            character = bytes(byte for byte, _ in window).decode("utf-8")
        except UnicodeDecodeError:
            start += 1
            continue
        found.append((character, [number for _, number in window]))
        start += size
    return found
