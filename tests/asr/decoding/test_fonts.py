from __future__ import annotations

import io
import warnings

import numpy as np
from matplotlib import font_manager

from asr.decoding import fonts
from asr.decoding.emission import EmissionPosteriors, emission_figure


def test_characters_that_no_font_has_are_drawn_as_code_points(monkeypatch):
    monkeypatch.setattr(fonts, "families", lambda: ["DejaVu Sans"])
    fonts._fonts.cache_clear()
    try:
        assert fonts.drawable("größer -> $x") == "größer -> $x"
        assert fonts.drawable("a你好 b") == "a U+4F60 U+597D b"
        assert fonts.drawable("\U0001fae8") == "U+1FAE8"
        assert fonts.drawable("") == ""
    finally:
        fonts._fonts.cache_clear()


def test_fonts_are_those_of_the_machine():
    installed = {entry.name for entry in font_manager.fontManager.ttflist}
    assert fonts.families()[0] == "DejaVu Sans" and set(fonts.families()) <= installed


def test_a_picture_of_chinese_text_warns_of_nothing():
    one = EmissionPosteriors("a", "你好\U0001fae8", ["你", "好"], np.ones(3), np.zeros(3), np.full((3, 2), 0.5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        emission_figure(one).savefig(io.BytesIO(), format="png")
