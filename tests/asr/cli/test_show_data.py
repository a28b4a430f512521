"""`asr show-data`: one page that needs nothing else."""

from __future__ import annotations

import base64
import io
import re
from html import unescape
from pathlib import Path

import numpy as np
import pytest
import soundfile
from matplotlib.image import imread

from asr.cli.main import main
from asr.data.manifests import save_cuts
from asr.data.tokenizer import Tokenizer, TokenizerConfig
from tests.asr.data.speech import WORDS, make_cut, make_samples, write_cuts

FLY = ["--set", "data.features.storage=on_the_fly"]


def test_a_page_holds_pictures_sound_and_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cuts = write_cuts(tmp_path / "audio", [0.9, 1.3])
    loud = tmp_path / "audio" / "loud.wav"
    soundfile.write(loud, np.clip(10 * make_samples(16000, 5), -1, 1), 16000, subtype="PCM_16")
    cuts.append(make_cut(loud, "<b>loud", "ONE <script>", 16000))
    save_cuts(cuts, tmp_path / "cuts.jsonl.gz")
    Tokenizer.train([" ".join(WORDS)], TokenizerConfig("char")).save(tmp_path / "tokenizer.json")
    words = ["--cuts", str(tmp_path / "cuts.jsonl.gz"), "--out", str(tmp_path / "new" / "page.html"), *FLY]
    words += ["--set", "data.augment.speed_factors=[1.0]", "--set", "data.augment.volume_db=40", "--num", "5"]
    assert main(["show-data", *words, "--tokenizer", str(tmp_path / "tokenizer.json")]) == 0
    assert capsys.readouterr().out.startswith(f"3 of 3 cuts in {tmp_path / 'new' / 'page.html'}, ")
    page = (tmp_path / "new" / "page.html").read_text()

    data = [base64.b64decode(part) for part in re.findall(r'src="data:[a-z/]+;base64,([^"]+)"', page)]
    pictures = [imread(io.BytesIO(part)) for part in data if part.startswith(b"\x89PNG")]
    assert len(pictures) == 6 and all(picture.shape[0] == 80 for picture in pictures)
    sounds = [soundfile.read(io.BytesIO(part)) for part in data if part.startswith(b"RIFF")]
    assert len(sounds) == 6 and all(rate == 16000 for _, rate in sounds)
    assert sorted(len(samples) for samples, _ in sounds) == [14400] * 2 + [16000] * 2 + [20800] * 2
    assert "dB softer than it is" in page  # up to 40 dB louder would be clipped

    assert not re.search(r'(?:src|href)="(?!data:|#)', page) and "media-src data:" in page
    assert page.count("<script") == 1 and "ONE &lt;script&gt;" in page and "&lt;b&gt;loud" in page
    assert "token &#x27;&lt;&#x27; of the text" in page or "token '<' of the text" in unescape(page)
    again = page
    assert main(["show-data", *words, "--tokenizer", str(tmp_path / "tokenizer.json")]) == 0
    assert (tmp_path / "new" / "page.html").read_text() == again
    assert main(["show-data", *words, "--tokenizer", str(tmp_path / "tokenizer.json"), "--epoch", "1"]) == 0
    assert (tmp_path / "new" / "page.html").read_text() != again


def test_what_cannot_be_shown_is_told_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_cuts(write_cuts(tmp_path, [0.9]), tmp_path / "cuts.jsonl.gz")
    words = ["show-data", "--cuts", str(tmp_path / "cuts.jsonl.gz"), "--out", str(tmp_path / "page.html")]
    assert main([*words, "--num", "0"]) == 2
    assert "--num 0 is too few; pass at least 1" in capsys.readouterr().err
    assert main([*words, *FLY]) == 2
    assert "vocab_size=500 is too large" in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()
