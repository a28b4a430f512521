"""Fetching and unpacking the archives of public corpora."""

from __future__ import annotations

import http.client
import logging
import shutil
import tarfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable
from pathlib import Path

from asr.errors import UserError

TIMEOUT_S = 30
_LOG = logging.getLogger(__name__)


def fetch(url: str, path: Path) -> Path:
    """Download ``url`` to ``path`` unless it is there already; a broken download never bears the final name."""
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    _LOG.info("downloading %s", url)
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as response, open(partial, "wb") as file:
            shutil.copyfileobj(response, file, length=1 << 20)
            declared = response.headers.get("Content-Length")
        if declared is not None and int(declared) != partial.stat().st_size:
            raise OSError(f"connection closed after {partial.stat().st_size} of {declared} bytes")
    except (OSError, http.client.HTTPException, urllib.error.URLError) as error:
        partial.unlink(missing_ok=True)
        reason = " ".join(str(getattr(error, "reason", None) or error).split()) or type(error).__name__
        raise UserError(
            f"cannot download {url} ({reason}); try again with a network, or pass --corpus-dir FOLDER "
            "if you have the corpus"
        ) from error
    partial.replace(path)
    return path


def fetch_and_unpack(url: str, dest: Path, archive_name: str, folder_name: str) -> Path:
    """Download a tar archive and unpack it as ``dest / folder_name``, whatever its own top folder is called.

    Unpacking happens in a folder beside it that is renamed at the end: a folder with the final name is complete.
    Members that would leave the folder, links to outside and special files are refused (tarfile's "data" filter).
    """
    folder = dest / folder_name
    if folder.is_dir():
        return folder
    if not hasattr(tarfile, "data_filter"):
        raise UserError("this Python unpacks archives without checks; use Python 3.10.12, 3.11.4, 3.12 or newer")
    archive = fetch(url, dest / archive_name)
    unpacked = dest / f"partial-{folder_name}"
    shutil.rmtree(unpacked, ignore_errors=True)
    unpacked.mkdir(parents=True)
    try:
        with tarfile.open(archive) as tar:
            tar.extractall(unpacked, filter="data")
    except (tarfile.TarError, EOFError, OSError) as error:
        shutil.rmtree(unpacked, ignore_errors=True)
        reason = " ".join(str(error).split())
        raise UserError(f"cannot unpack {archive} ({reason}); delete it and run the download stage again") from error
    top = [path for path in unpacked.iterdir() if path.is_dir()]
    (top[0] if len(top) == 1 else unpacked).replace(folder)
    shutil.rmtree(unpacked, ignore_errors=True)
    return folder


def places_of(corpus_dir: Path | None, corpus: str, subfolders: tuple[str, ...]) -> list[Path]:
    """``corpus_dir`` and its ``subfolders``: a user may give the corpus's own folder or that in which it was unpacked.

    Raises UserError if there is no folder.
    """
    if corpus_dir is None:
        raise UserError(f"{corpus} needs recordings: run the download stage, or pass --corpus-dir FOLDER")
    return [corpus_dir, *(corpus_dir / name for name in subfolders)]


def find_wavs(
    corpus_dir: Path | None, corpus: str, subfolders: tuple[str, ...], expected: str
) -> tuple[Path, list[Path]]:
    """The folder that holds the corpus's wav files (``corpus_dir`` or one of its ``subfolders``), and them, sorted.

    Raises UserError that names the places looked at, and ``expected``, what a wav file of this corpus is called.
    """
    places = places_of(corpus_dir, corpus, subfolders)
    if not places[0].is_dir():
        raise UserError(f"--corpus-dir {corpus_dir} is not a folder; {corpus} needs one with {expected}")
    for place in places:
        wavs = sorted(path for path in place.glob("*.wav") if not path.name.startswith("."))
        if wavs:
            return place, wavs
    looked = ", ".join(str(place) for place in places)
    raise UserError(f"no wav files of {corpus} in {looked}; pass --corpus-dir a folder with {expected}")


def lhotse_download(
    run: Callable[[], object], folder: Path, what: str = "the corpus", option: str = "--corpus-dir FOLDER"
) -> Path:
    """A downloader of lhotse, which takes up a broken download where it ended; ``folder`` is where the corpus then is.
    ``what`` it is and the ``option`` that takes a folder instead are for messages.

    Raises UserError without a network, and for an archive that cannot be unpacked.
    """
    try:
        run()
    except (OSError, http.client.HTTPException, tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
        reason = " ".join(str(getattr(error, "reason", None) or error).split()) or type(error).__name__
        raise UserError(
            f"cannot download {what} ({reason}); try again with a network, or pass {option} if you have it"
        ) from error
    if not folder.is_dir():
        raise UserError(f"the download left no {folder}; delete {folder.parent} and run the download stage again")
    return folder
