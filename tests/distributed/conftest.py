from __future__ import annotations

from pathlib import Path

import pytest

from tests.asr.training.runs import write_data


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with cuts and their features, for `read_data`."""
    folder = tmp_path_factory.mktemp("data")
    write_data(folder)
    return folder
