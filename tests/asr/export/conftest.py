"""A checkpoint with random weights that emit tokens, and recordings."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from lhotse import CutSet

from asr import checkpoint
from asr.checkpoint import Loaded
from asr.config import load_experiment
from asr.data.features import load_samples
from asr.decoding.load import load_for_decoding
from asr.export.eager import hear_streams, pad_for_devices
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


@pytest.fixture(scope="session")
def heard(loaded: Loaded, cuts: CutSet) -> CutSet:
    return with_heard_texts(loaded, cuts)


def with_heard_texts(loaded: Loaded, cuts: CutSet) -> CutSet:
    """The recordings with what the float model hears as their texts: its errors are 0."""
    found = []
    for cut in cuts:
        parts = [pad_for_devices(load_samples(cut), 320)]
        ((one,),) = hear_streams(loaded, [parts], 320, 640)
        supervision = dataclasses.replace(cut.supervisions[0], text=loaded.tokenizer.decode(one.tokens))
        found.append(dataclasses.replace(cut, supervisions=[supervision]))
    return CutSet.from_cuts(found)
