"""A checkpoint with random weights that emit tokens, and recordings."""

from __future__ import annotations

from pathlib import Path

import pytest
from lhotse import CutSet

from asr import checkpoint
from asr.checkpoint import Loaded
from asr.config import load_experiment
from asr.decoding.load import load_for_decoding
from asr.models.transducer import Transducer
from tests.asr.decoding.corpus import tokenizer, write_cuts
from tests.asr.decoding.test_real_model import SETTINGS, make_model

TEXTS = ["ab c", "b", "", "a a a", "cab", "bb a c", "abc"]


def write_checkpoint(path: Path, model: Transducer, *settings: str) -> Path:
    experiment = load_experiment(None, [*SETTINGS, *settings])
    payload = checkpoint.make_payload(model.state_dict(), experiment, tokenizer(), step=7, epoch=1)
    checkpoint.atomic_save(payload, path)
    return path


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of the checkpoint."""
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "average.pt", make_model(blank_bias=1.0))


@pytest.fixture(scope="session")
def loaded(trained: Path) -> Loaded:
    return load_for_decoding(trained, "cpu")


@pytest.fixture(scope="session")
def cuts_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recordings")
    write_cuts(folder, TEXTS).to_file(folder / "cuts.jsonl.gz")
    return folder / "cuts.jsonl.gz"


@pytest.fixture(scope="session")
def cuts(cuts_file: Path) -> CutSet:
    return CutSet.from_file(cuts_file).to_eager()
