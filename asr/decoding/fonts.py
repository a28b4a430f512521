"""Text of any script in pictures: in a font that has it, or as code points."""

from __future__ import annotations

from functools import cache

from matplotlib import font_manager
from matplotlib.ft2font import FT2Font

# Of Chinese, Japanese and Korean, in the order of preference; which of them there are differs from machine to machine.
_FURTHER = (
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Noto Sans SC",
    "Source Han Sans SC",
    "Source Han Sans CN",
    "WenQuanYi Zen Hei",
    "WenQuanYi Micro Hei",
    "Droid Sans Fallback",
    "AR PL UMing CN",
    "PingFang SC",
    "Hiragino Sans GB",
    "Microsoft YaHei",
    "SimHei",
    "Arial Unicode MS",
)


@cache
def families() -> list[str]:
    """Font families for matplotlib, which takes each character from the first that has it."""
    installed = {entry.name for entry in font_manager.fontManager.ttflist}
    return ["DejaVu Sans", *(name for name in _FURTHER if name in installed)]


@cache
def _fonts() -> list[FT2Font]:
    return [font_manager.get_font(font_manager.findfont(name)) for name in families()]


def drawable(text: str) -> str:
    """The text with ``U+4F60`` for each character that no font here can draw; to be drawn in ``families()``."""
    shown = ""
    for character in text:
        known = character.isspace() or any(font.get_char_index(ord(character)) for font in _fonts())
        shown += character if known else f"{' ' if shown else ''}U+{ord(character):04X}"
    return shown
