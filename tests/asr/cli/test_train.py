"""What ``asr train`` refuses before it does any work."""

from __future__ import annotations

from pathlib import Path

import pytest

from asr.cli.main import main
from asr.data.manifests import save_cuts
from asr.data.tokenizer import Tokenizer
from tests.asr.data.speech import write_cuts


@pytest.mark.parametrize("wrong", ["--valid-cuts", "--out-dir"])
def test_wrong_places_are_told_before_the_tokenizer_is_learnt(
    wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Tokenizer, "train", lambda *_: pytest.fail("learnt already"))
    cuts, a_file = tmp_path / "cuts.jsonl.gz", tmp_path / "a_file"
    save_cuts(write_cuts(tmp_path / "audio", [0.5]), cuts)
    a_file.write_text("")
    places = {"--train-cuts": cuts, "--valid-cuts": cuts, "--out-dir": tmp_path / "out", wrong: a_file}
    assert main(["train", *(str(word) for pair in places.items() for word in pair)]) == 2
    error = capsys.readouterr().err
    assert str(a_file) in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
