"""Options and fixtures that every test can use. Nothing is seeded here: a test that draws random numbers seeds its own
generator, so that it gives the same result alone and in the whole suite."""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("speech transducers")
    group.addoption(
        "--slow",
        choices=("none", "one", "all"),
        default="none",
        help="tests marked slow: none of them, one of each file (a file is a group), or all",
    )
    group.addoption(
        "--corpus-dir",
        type=Path,
        default=None,
        metavar="DIR",
        help="folder of real recordings, one folder per corpus named as its official download unpacks "
        "(waves_yesno, free-spoken-digit-dataset); tests that need them are skipped without it",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes long; runs only with --slow one or --slow all")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the slow tests that --slow does not ask for."""
    wanted = config.getoption("--slow")
    if wanted == "all":
        return
    kept, dropped, groups = [], [], set()
    for item in items:
        take = not item.get_closest_marker("slow") or (wanted == "one" and item.path not in groups)
        if item.get_closest_marker("slow") and take:
            groups.add(item.path)
        (kept if take else dropped).append(item)
    config.hook.pytest_deselected(items=dropped)
    items[:] = kept


@pytest.fixture(scope="session")
def corpus_dir(pytestconfig: pytest.Config) -> Path:
    """Folder given by --corpus-dir; the test is skipped when none was given."""
    folder: Path | None = pytestconfig.getoption("--corpus-dir")
    if folder is None:
        pytest.skip("needs real recordings: pass --corpus-dir DIR (waves_yesno/, free-spoken-digit-dataset/ in it)")
    if not folder.is_dir():
        raise pytest.UsageError(f"--corpus-dir {folder} is not a folder; unpack the corpora there or leave it out")
    return folder.resolve()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cuts of tests/asr/training/runs.py with their features; the tests of a file share it and only read it."""
    from tests.asr.training.runs import write_data  # imports torch, which most tests need not wait for

    folder = tmp_path_factory.mktemp("data")
    write_data(folder)
    return folder
