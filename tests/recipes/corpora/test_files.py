"""Changed files of a corpus are noticed by names, sizes and times."""

from __future__ import annotations

import os
from pathlib import Path

from asr.data.manifests import save_cuts
from recipes.corpora.base import make_cut
from recipes.corpora.files import files_of


def test_changed_added_and_lost_files(tmp_path: Path) -> None:
    own, exp = tmp_path / "own", tmp_path / "own" / "exp"
    (own / "train").mkdir(parents=True)
    outside = tmp_path / "a.wav"
    for path in (outside, own / "train" / "text", own / "train" / "b.wav"):
        path.write_text("1")
    (own / "train" / "wav.scp").write_text(f"a {outside}\nb b.wav\nc cat /x |\nd\n")
    exp.mkdir()
    seen = [files_of(own, (), exp)]
    assert seen[0] is not None and seen[0].startswith("4 files, ")
    (exp / "output").write_text("x")
    (own / ".hidden").write_text("x")
    assert files_of(own, (), exp) == seen[0]
    (own / "train" / "text").write_text("2")
    os.utime(own / "train" / "text", ns=(1, 1))
    seen.append(files_of(own, (), exp))
    outside.write_text("longer")
    seen.append(files_of(own, (), exp))
    outside.unlink()
    seen.append(files_of(own, (), exp))
    (own / "train" / "c.wav").write_text("x")
    seen.append(files_of(own, (), exp))
    save_cuts([make_cut("e", tmp_path / "e.wav", 16000, "A", "s")], own / "cuts_test.jsonl.gz")
    seen.append(files_of(own, (), exp))
    (tmp_path / "e.wav").write_text("x")
    seen.append(files_of(own, (), exp))
    assert len(set(seen)) == len(seen) == 7
    assert files_of(tmp_path / "none", (), exp) is None


def test_only_the_archives_count_where_they_are(tmp_path: Path) -> None:
    for name in ("LibriSpeech/dev-clean", "LibriSpeech/dev-other"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "a.flac").write_text("x")
    before = files_of(tmp_path, ("dev-clean",), tmp_path / "exp")
    (tmp_path / "LibriSpeech/dev-other/b.flac").write_text("x")
    assert files_of(tmp_path, ("dev-clean",), tmp_path / "exp") == before
    (tmp_path / "LibriSpeech/dev-clean/b.flac").write_text("x")
    assert files_of(tmp_path, ("dev-clean",), tmp_path / "exp") != before
