"""--with-musan and --with-rirs: what is fetched, what the training is told, and what must run again."""

from __future__ import annotations

import io
import json
import urllib.error
import zipfile
from pathlib import Path

import numpy as np
import pytest
import soundfile

from asr.errors import UserError
from recipes import sounds
from recipes.cli import continuing_command, make_parser
from recipes.engine import Pipeline
from recipes.stages import Recipe, check_beginning, make_recipe, run_download

LATER = ["features", "train", "average", "decode", "score", "export", "verify", "report"]


def make(root: Path, *words: str) -> tuple[Recipe, Pipeline]:
    corpus = root / "corpus"
    corpus.mkdir(exist_ok=True)
    (corpus / "README").touch()
    base = ["--exp-dir", str(root / "exp"), "--corpus-dir", str(corpus), "--download-dir", str(root / "downloads")]
    return make_recipe("yesno", make_parser("yesno").parse_args([*base, *words]), "command", None)


def write_sound(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, 0.1 * np.random.default_rng(0).standard_normal(8000), 16000)


def fake_musan(target_dir: Path) -> Path:
    for kind in ("noise", "music", "speech"):
        write_sound(Path(target_dir) / "musan" / kind / "part" / f"{kind}-part-0000.wav")
    return Path(target_dir) / "musan"


def test_the_download_stage_fetches_what_training_is_told(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("lhotse.recipes.musan.download_musan", fake_musan)
    archive = tmp_path / "rirs.zip"
    with zipfile.ZipFile(archive, "w") as file:
        write_sound(tmp_path / "a.wav")
        file.write(tmp_path / "a.wav", "RIRS_NOISES/simulated_rirs/smallroom/Room001/a.wav")
    monkeypatch.setattr("lhotse.recipes.rir_noise.RIR_NOISE_ZIP_URL", archive.as_uri())
    fetched = []

    def fake_download(url: str, path: Path, force_download: bool = False) -> None:
        fetched.append(force_download)
        Path(path).write_bytes(archive.read_bytes())

    monkeypatch.setattr("lhotse.recipes.rir_noise.resumable_download", fake_download)
    recipe, _ = make(tmp_path, "--with-musan", "--with-rirs")
    run_download(recipe)
    downloads = tmp_path / "downloads"
    assert sorted(path.name for path in downloads.iterdir()) == ["RIRS_NOISES", "musan"]
    augment = recipe.experiment.data.augment
    assert (augment.recorded_noise.path, augment.reverb.path) == (
        str(downloads / "musan"),
        str(downloads / "RIRS_NOISES"),
    )
    assert f"musan: {downloads / 'musan'}" in capsys.readouterr().out
    check_beginning(recipe)
    run_download(recipe)
    assert fetched == [False], "what is there stays"


def test_a_broken_archive_is_fetched_anew(tmp_path: Path, monkeypatch) -> None:
    work = tmp_path / "partial-RIRS_NOISES"
    (work / "RIRS_NOISES" / "half").mkdir(parents=True)
    (work / "rirs_noises.zip").write_bytes(b"half of it")
    forced = []

    def fake_download(url: str, path: Path, force_download: bool = False) -> None:
        forced.append(force_download)
        content = io.BytesIO()
        with zipfile.ZipFile(content, "w") as file:
            file.writestr("RIRS_NOISES/README", "whole")
        Path(path).write_bytes(content.getvalue())

    monkeypatch.setattr("lhotse.recipes.rir_noise.resumable_download", fake_download)
    folder = sounds.fetch_rirs(tmp_path)
    assert forced == [True] and [path.name for path in folder.iterdir()] == ["README"] and not work.exists()


@pytest.mark.parametrize(("name", "module"), [("musan", "lhotse.recipes.musan"), ("rirs", "lhotse.recipes.rir_noise")])
def test_without_a_network_the_option_is_named(tmp_path: Path, monkeypatch, name: str, module: str) -> None:
    def refuse(*args, **kwargs) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(f"{module}.resumable_download", refuse)
    recipe, _ = make(tmp_path, f"--with-{name}")
    with pytest.raises(UserError, match=f"cannot download .* \\(no network\\); .*pass --with-{name} FOLDER") as caught:
        run_download(recipe)
    assert "\n" not in str(caught.value)


def test_a_given_folder_is_used_where_it_is(tmp_path: Path) -> None:
    given = fake_musan(tmp_path / "my sounds: all")
    recipe, _ = make(tmp_path, "--with-musan", str(given))
    run_download(recipe)
    assert recipe.experiment.data.augment.recorded_noise.path == str(given)
    assert not (tmp_path / "downloads").exists()
    (tmp_path / "empty").mkdir()
    recipe, _ = make(tmp_path, "--with-rirs", str(tmp_path / "empty"), "--set", "data.features.storage=on_the_fly")
    for attempt in (run_download, check_beginning):
        with pytest.raises(UserError, match="data.augment.reverb.path: the folder .*empty holds no audio"):
            attempt(recipe)


def test_what_must_run_again(tmp_path: Path) -> None:
    _, before = make(tmp_path)
    for words in (["--with-musan"], ["--with-rirs", "room"], ["--set", "data.augment.recorded_noise.path=a"]):
        _, after = make(tmp_path, *words)
        changed = [stage.name for stage in before.stages if before.hashes[stage.name] != after.hashes[stage.name]]
        assert changed == LATER
        assert (before.settings["download"] != after.settings["download"]) == (words[0] != "--set")
    assert json.loads(json.dumps(after.settings["train"]))["experiment.data.augment.recorded_noise.path"] == "a"
    assert continuing_command("yesno", ["--with-musan", "--stage", "1"]).endswith("--with-musan")
