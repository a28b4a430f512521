from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from asr.errors import UserError
from recipes.corpora import download


def make_tar(path: Path, members: dict[str, bytes], link: tuple[str, str] | None = None) -> str:
    with tarfile.open(path, "w:gz") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        if link:
            info = tarfile.TarInfo(link[0])
            info.type, info.linkname = tarfile.SYMTYPE, link[1]
            tar.addfile(info)
    return path.as_uri()


def test_archive_is_fetched_unpacked_and_kept(tmp_path: Path) -> None:
    url = make_tar(tmp_path / "source.tar.gz", {"corpus-master/a.wav": b"1", "corpus-master/sub/b.wav": b"2"})
    folder = download.fetch_and_unpack(url, tmp_path / "dest", "corpus.tar.gz", "corpus")
    assert folder == tmp_path / "dest" / "corpus"
    assert (folder / "sub" / "b.wav").read_bytes() == b"2"
    (tmp_path / "source.tar.gz").unlink()
    assert download.fetch_and_unpack(url, tmp_path / "dest", "corpus.tar.gz", "corpus") == folder
    assert sorted(path.name for path in (tmp_path / "dest").iterdir()) == ["corpus", "corpus.tar.gz"]


@pytest.mark.parametrize("members", [{"../evil.wav": b"1"}, {"/tmp/../../evil.wav": b"1", "x/../../evil.wav": b"1"}])
def test_members_outside_the_folder_are_refused(tmp_path: Path, members: dict[str, bytes]) -> None:
    url = make_tar(tmp_path / "source.tar.gz", members)
    with pytest.raises(UserError, match="cannot unpack"):
        download.fetch_and_unpack(url, tmp_path / "dest", "corpus.tar.gz", "corpus")
    assert not (tmp_path / "dest" / "corpus").exists()
    assert not list(tmp_path.rglob("evil.wav"))


def test_links_to_outside_are_refused(tmp_path: Path) -> None:
    url = make_tar(tmp_path / "source.tar.gz", {"corpus/a.wav": b"1"}, link=("corpus/passwd", "/etc/passwd"))
    with pytest.raises(UserError, match="cannot unpack"):
        download.fetch_and_unpack(url, tmp_path / "dest", "corpus.tar.gz", "corpus")


def test_broken_archive_is_named(tmp_path: Path) -> None:
    url = make_tar(tmp_path / "source.tar.gz", {"corpus/a.wav": bytes(range(256)) * 400})
    (tmp_path / "source.tar.gz").write_bytes((tmp_path / "source.tar.gz").read_bytes()[:200])
    with pytest.raises(UserError, match=r"cannot unpack .*corpus\.tar\.gz .* delete it"):
        download.fetch_and_unpack(url, tmp_path / "dest", "corpus.tar.gz", "corpus")


def test_failure_is_one_line_that_offers_corpus_dir(tmp_path: Path) -> None:
    url = (tmp_path / "absent.tar.gz").as_uri()
    with pytest.raises(UserError, match="cannot download .*--corpus-dir FOLDER") as caught:
        download.fetch(url, tmp_path / "dest" / "a.tar.gz")
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "dest").iterdir()) == []


def test_unreachable_server(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="refused.*--corpus-dir"):
        download.fetch("http://127.0.0.1:9/a.tar.gz", tmp_path / "a.tar.gz")


def test_find_wavs_names_the_places(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="run the download stage"):
        download.find_wavs(None, "c", (), "files")
    with pytest.raises(UserError, match="is not a folder"):
        download.find_wavs(tmp_path / "absent", "c", (), "files")
    with pytest.raises(UserError, match=f"no wav files of c in {tmp_path}, {tmp_path / 'sub'}; .* like 1.wav"):
        download.find_wavs(tmp_path, "c", ("sub",), "files like 1.wav")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.wav").touch()
    assert download.find_wavs(tmp_path, "c", ("sub",), "files") == (tmp_path / "sub", [tmp_path / "sub" / "b.wav"])
