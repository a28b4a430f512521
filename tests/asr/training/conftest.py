"""What tests of one file share; they only read it, or copy it."""

from __future__ import annotations

from pathlib import Path

import pytest

from asr.training.trainer import TrainData
from tests.asr.training.runs import read_data, run


@pytest.fixture(scope="module")
def data(folder: Path) -> TrainData:
    return read_data(folder)


@pytest.fixture(scope="module")
def finished(data: TrainData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs."""
    out = tmp_path_factory.mktemp("finished")
    assert run(data, out).reason == "finished"
    return out
