"""Recordings for augmentation that recipes fetch or are given: MUSAN and room impulse responses."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from recipes.corpora.download import lhotse_download


@dataclass(frozen=True)
class Sounds:
    """A public collection.

    Args:
        folder: what it is called where its archive is unpacked.
        key: the setting that names it.
        fetch: downloads and unpacks it below a folder; what is there already stays.
        help: of the option.
    """

    folder: str
    key: str
    fetch: Callable[[Path], Path]
    help: str


@dataclass(frozen=True)
class Chosen:
    """A collection that a run takes, and where it is or will be; ``given`` by the user, and not downloaded."""

    name: str
    path: Path
    given: bool

    @property
    def setting(self) -> str:
        """The override that tells the training where it is."""
        return f"{SOUNDS[self.name].key}={json.dumps(str(self.path))}"

    def settle(self) -> Path:
        """Downloads it if need be. Raises UserError without a network."""
        return self.path if self.given else SOUNDS[self.name].fetch(self.path.parent)


def fetch_musan(dest: Path) -> Path:
    """MUSAN from OpenSLR 17, 11 GB, by lhotse's downloader."""
    from lhotse.recipes.musan import download_musan

    return lhotse_download(lambda: download_musan(dest), dest / "musan", "MUSAN", "--with-musan FOLDER")


def fetch_rirs(dest: Path) -> Path:
    """RIRS_NOISES from OpenSLR 28, 1.3 GB, by lhotse's downloader. That takes any folder and any archive of these names
    for complete, so it works in a folder beside, and a broken archive is fetched anew."""
    from lhotse.recipes.rir_noise import download_rir_noise

    folder, work = dest / "RIRS_NOISES", dest / "partial-RIRS_NOISES"
    if folder.is_dir():
        return folder
    shutil.rmtree(work / "RIRS_NOISES", ignore_errors=True)
    archive = work / "rirs_noises.zip"
    broken = archive.exists() and not zipfile.is_zipfile(archive)
    unpacked = lhotse_download(
        lambda: download_rir_noise(work, force_download=broken),
        work / "RIRS_NOISES",
        "RIRS_NOISES",
        "--with-rirs FOLDER",
    )
    unpacked.replace(folder)
    shutil.rmtree(work, ignore_errors=True)
    return folder


SOUNDS: dict[str, Sounds] = {
    "musan": Sounds(
        "musan",
        "data.augment.recorded_noise.path",
        fetch_musan,
        "add noise, music and babble from MUSAN: of this folder, else the download stage fetches it (11 GB)",
    ),
    "rirs": Sounds(
        "RIRS_NOISES",
        "data.augment.reverb.path",
        fetch_rirs,
        "reverberate with room responses: of this folder, else the download stage fetches RIRS_NOISES (1.3 GB)",
    ),
}


def chosen_sounds(options: dict[str, str | None], download_dir: Path) -> list[Chosen]:
    """What ``--with-<name> [DIR]`` ask for: None is not asked for, "" is to be downloaded."""
    return [
        Chosen(name, Path(given).absolute() if given else (download_dir / SOUNDS[name].folder).absolute(), bool(given))
        for name, given in options.items()
        if given is not None
    ]
