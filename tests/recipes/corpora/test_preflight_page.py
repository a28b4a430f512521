"""The page of the pre-flight report: whole in one file, with spelling and memory of the training."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from asr.config import Experiment, load_experiment
from recipes.corpora import Prepared, custom
from recipes.corpora.preflight_page import write_page
from tests.recipes.corpora.test_custom import write_folder

TINY = ["tokenizer.kind=char", "model.preset=xs", "data.max_duration_s=20"]


def made(tmp_path: Path, valid: str, *settings: str) -> tuple[Prepared, Experiment]:
    write_folder(tmp_path / "own/train", {"<b>&": "ONE TWO", "t1": "TWO ONE"})
    write_folder(tmp_path / "own/valid", {"d0": valid, "d1": valid})
    write_folder(tmp_path / "own/test", {"e0": "ONE", "e1": "TWO Ö"})
    prepared = custom.prepare(tmp_path / "own", tmp_path / "data", seed=0, options=custom.Options())
    return prepared, load_experiment(overrides=[*TINY, *settings])


def written(prepared: Prepared, experiment: Experiment) -> list[str]:
    assert prepared.preflight is not None
    return write_page(prepared, prepared.preflight, experiment, "cpu")


def test_one_file_with_picture_spelling_and_memory(tmp_path: Path) -> None:
    lines = written(*made(tmp_path, "TWO"))
    page = (tmp_path / "data" / "preflight.html").read_text(encoding="utf-8")
    assert "data:image/png;base64,iVBOR" in page and not re.search(r"(src|href)=.?(http|//|[a-z]+\\.)", page)
    assert "<b>&" not in page and "&lt;b&gt;&amp;" in page
    assert any(line.startswith("test: 1 of 2 texts have no spelling, the first: token 'Ö'") for line in lines)
    memory = next(line for line in lines if line.startswith("peak memory of training: about "))
    peak, always = (float(n) for n in re.findall(r"([0-9.]+)MiB", memory)[:2])
    assert 100 < always < peak < 2000 and "largest batch (20 s, longest utterance 1.8 s)" in memory
    assert not any(line.startswith("warning") for line in lines) and memory in page.replace("&#x27;", "'")


def test_validation_texts_that_nobody_can_spell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = "peak memory: not asked for"
    monkeypatch.setattr("recipes.corpora.preflight_page.expected_memory", lambda *_: (said, []))
    lines = written(*made(tmp_path, "ÄÖ"))
    assert any("warning: the tokenizer cannot spell any validation text" in line for line in lines)
    assert "cannot spell any validation text" in (tmp_path / "data" / "preflight.html").read_text(encoding="utf-8")


def test_texts_that_make_no_tokenizer(tmp_path: Path) -> None:
    lines = written(*made(tmp_path, "ONE", "tokenizer.kind=bpe", "tokenizer.vocab_size=5000"))
    assert any(line.startswith("warning: the training texts make no tokenizer: ") for line in lines)
    assert "peak memory: not known without a tokenizer" in lines
