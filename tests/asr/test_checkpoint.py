"""Checkpoint files: written whole or not at all, damage found when read, nothing in them is run."""

from __future__ import annotations

import errno
import os
import pickle
import random
import resource
import shutil
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from asr import checkpoint
from asr.checkpoint import FORMAT_VERSION, atomic_save
from asr.config import Experiment
from asr.data.tokenizer import Tokenizer, TokenizerConfig
from asr.errors import CheckpointError
from asr.models.transducer import Transducer, build_model
from tests.asr.training.runs import TOKENIZER, differences, experiment


def payload_of(step: int = 7, *settings: str) -> dict[str, Any]:
    config = experiment(*settings)
    torch.manual_seed(step)
    weights = Transducer(config.model, TOKENIZER.vocab_size).state_dict()
    return checkpoint.make_payload(weights, config, TOKENIZER, step=step, epoch=2)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoints" / "step-00000007.pt"
    atomic_save(payload_of(), path)
    return path


def others(path: Path) -> list[str]:
    return sorted(p.name for p in path.parent.iterdir() if p != path)


# -- writing ----------------------------------------------------------------------------------------------------------


def test_what_was_saved_is_read(saved: Path) -> None:
    payload = checkpoint.read(saved)
    assert payload["format_version"] == FORMAT_VERSION
    assert differences(payload, payload_of()) == [] and others(saved) == []
    assert checkpoint.is_good(saved)


def fail_in_the_middle(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    def save(payload: Any, file: Any) -> None:
        file.write(b"PK\x03\x04 half a checkpoint")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", save)


def fail_at(name: str) -> Any:
    def damage(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
        def fail(*args: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, name, fail)

    return damage


def full_device(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    """The kernel itself refuses every byte."""
    path.with_name(f".{path.name}.partial").symlink_to("/dev/full")


FULL = [fail_in_the_middle, fail_at("fsync"), fail_at("replace"), full_device]


@pytest.mark.parametrize("damage", FULL, ids=["write", "fsync", "replace", "dev-full"])
def test_a_full_disk_leaves_the_old_file(damage: Any, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved.read_bytes()
    damage(monkeypatch, saved)
    with pytest.raises(OSError) as caught:
        atomic_save(payload_of(8), saved)
    monkeypatch.undo()
    assert caught.value.errno == errno.ENOSPC
    assert saved.read_bytes() == before and others(saved) == []
    atomic_save(payload_of(8), saved)
    assert checkpoint.read(saved)["step"] == 8


@pytest.fixture
def file_size_limit() -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_file_that_may_not_grow_leaves_the_old_one(saved: Path, file_size_limit: None) -> None:
    """The kernel takes a part of the bytes, and no more: torch's writer is somewhere in a tensor."""
    before = saved.read_bytes()
    assert len(before) > 20_000
    with pytest.raises(OSError) as caught:
        atomic_save(payload_of(8), saved)
    assert caught.value.errno == errno.EFBIG
    assert saved.read_bytes() == before and others(saved) == []


def test_an_interruption_leaves_the_old_file(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    before = saved.read_bytes()
    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        atomic_save(payload_of(8), saved)
    assert saved.read_bytes() == before and others(saved) == []


def test_the_file_is_on_the_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(number: int) -> None:
        calls.append("fsync folder" if os.path.isdir(f"/proc/self/fd/{number}") else "fsync file")
        real_fsync(number)

    def rename(source: Path, target: Path) -> None:
        calls.append("replace")
        assert zipfile.ZipFile(source).testzip() is None
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", rename)
    atomic_save(payload_of(), tmp_path / "new" / "a.pt")
    assert calls == ["fsync file", "replace", "fsync folder"]


# -- reading what is damaged ------------------------------------------------------------------------------------------


def neighbour(path: Path, step: int = 6) -> Path:
    other = path.with_name(f"step-{step:08d}.pt")
    atomic_save(payload_of(step), other)
    return other


def record_bytes(path: Path) -> list[range]:
    """Where the content of each record lies."""
    found = []
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        for info in archive.infolist():
            file.seek(info.header_offset + 26)
            name, extra = (int.from_bytes(file.read(2), "little") for _ in range(2))
            first = info.header_offset + 30 + name + extra
            found.append(range(first, first + info.compress_size))
    return found


def flip(path: Path, position: int, mask: int) -> None:
    with open(path, "r+b") as file:
        file.seek(position)
        value = file.read(1)[0]
        file.seek(position)
        file.write(bytes([value ^ mask]))


def test_a_flipped_bit_in_any_record_is_found(saved: Path) -> None:
    other = neighbour(saved)
    draw = random.Random(0)
    regions = [r for r in record_bytes(saved) if len(r)]
    assert len(regions) > 40 and sum(map(len, regions)) > 0.6 * saved.stat().st_size
    for position in [draw.choice(region) for region in regions for _ in range(2)]:
        mask = 1 << draw.randrange(8)
        flip(saved, position, mask)
        with pytest.raises(CheckpointError) as caught:
            checkpoint.read(saved)
        assert f"{saved} is corrupt" in str(caught.value) and f"{other} is whole" in str(caught.value)
        assert "\n" not in str(caught.value)
        flip(saved, position, mask)
    assert checkpoint.is_good(saved)


def test_a_flipped_bit_anywhere_is_found_or_does_no_harm(saved: Path) -> None:
    """The frame of the archive holds bytes without meaning (dates, padding), and bytes that ask for strange things."""
    other = neighbour(saved)
    expected = payload_of()
    regions = record_bytes(saved)
    frame = [p for p in range(saved.stat().st_size) if not any(p in region for region in regions[:3] + regions[-3:])]
    draw = random.Random(1)
    headers = [*range(0, 60), *draw.sample(frame[-4000:], 120), *range(saved.stat().st_size - 90, saved.stat().st_size)]
    found = 0
    for position in headers:
        flip(saved, position, 1 << draw.randrange(8))
        shutil.copy(saved, other)  # the neighbour has the same damage: looking for a whole one must not fail either
        try:
            assert differences(checkpoint.read(saved), expected) == []
        except CheckpointError as error:
            found += 1
            assert "is whole" not in str(error)
        atomic_save(expected, saved)
    assert found > 40


@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.3, 0.9, 0.999])
def test_a_truncated_file(saved: Path, fraction: float) -> None:
    other = neighbour(saved)
    os.truncate(saved, int(saved.stat().st_size * fraction))
    with pytest.raises(CheckpointError, match=f"corrupt or no checkpoint .*; {other} is whole, use that one"):
        checkpoint.read(saved)
    assert not checkpoint.is_good(saved)


def test_a_missing_file_names_a_whole_one_and_not_a_damaged_one(saved: Path) -> None:
    damaged = neighbour(saved, 9)
    os.truncate(damaged, 100)
    with pytest.raises(CheckpointError, match=f"does not exist; {saved} is whole"):
        checkpoint.read(saved.with_name("step-00000008.pt"))
    with pytest.raises(CheckpointError, match="does not exist$"):
        checkpoint.read(saved.parent / "none" / "a.pt")


def test_files_that_are_not_ours(tmp_path: Path) -> None:
    contents = {"text.pt": b"lr: 1\n", "empty.pt": b""}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match="no checkpoint"):
            checkpoint.read(tmp_path / name)
    values = {
        "tensor": torch.zeros(3),
        "dict": {"model": 1},
        "list": [1],
        "foreign": {"format_version": FORMAT_VERSION},
    }
    for name, value in values.items():
        path = tmp_path / f"{name}.pt"
        torch.save(value, path)
        with pytest.raises(CheckpointError, match="no checkpoint of this toolkit"):
            checkpoint.load(path)
    with zipfile.ZipFile(tmp_path / "archive.pt", "w") as archive:
        archive.writestr("a.txt", "text")
    with pytest.raises(CheckpointError, match="no checkpoint"):
        checkpoint.read(tmp_path / "archive.pt")
    with pytest.raises(CheckpointError):
        checkpoint.read(tmp_path)


def test_another_format_version(saved: Path) -> None:
    for version in (FORMAT_VERSION + 1, 0):
        torch.save({**payload_of(), "format_version": version}, saved)
        with pytest.raises(CheckpointError, match=f"format version {version}, this program reads {FORMAT_VERSION}"):
            checkpoint.read(saved)
    torch.save({"format_version": 99}, saved)
    with pytest.raises(CheckpointError, match="format version 99"):
        checkpoint.read(saved)


class Malicious:
    """Creates a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return (open, (str(self.target), "w"))


def test_code_in_a_file_does_not_run(tmp_path: Path) -> None:
    target = tmp_path / "pwned"
    evil = {**payload_of(), "extra": Malicious(target)}
    torch.save(evil, tmp_path / "zip.pt")
    torch.save(evil, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps({"format_version": 1, "extra": Malicious(target)}))
    for name in ("zip.pt", "legacy.pt", "pickle.pt"):
        with pytest.raises(CheckpointError, match="corrupt or no checkpoint"):
            checkpoint.load(tmp_path / name)
    assert not target.exists()
    pickle.loads((tmp_path / "pickle.pt").read_bytes())["extra"].close()
    assert target.exists(), "the file would have run code in a loader that lets it"


# -- a folder of checkpoints ------------------------------------------------------------------------------------------


def test_the_newest_whole_checkpoint(tmp_path: Path) -> None:
    for step in (90, 100, 110, 1000):
        atomic_save(payload_of(step), tmp_path / checkpoint.step_name(step))
    (tmp_path / ".step-00002000.pt.partial").write_bytes(b"half")
    said: list[str] = []
    assert checkpoint.newest_good(tmp_path, said.append) == tmp_path / "step-00001000.pt" and said == []
    os.truncate(tmp_path / "step-00001000.pt", 5000)
    flip(tmp_path / "step-00000110.pt", 3000, 4)
    assert checkpoint.newest_good(tmp_path, said.append) == tmp_path / "step-00000100.pt"
    assert len(said) == 2 and "step-00001000.pt" in said[0] and "step-00000110.pt" in said[1]
    assert checkpoint.newest_good(tmp_path / "none", said.append) is None


def test_prune_keeps_the_newest(tmp_path: Path) -> None:
    for step in (8, 9, 10, 11):
        (tmp_path / checkpoint.step_name(step)).touch()
    for name in ("best.pt", ".step-00000012.pt.partial", "step-00000020.pt.old"):
        (tmp_path / name).touch()
    checkpoint.prune(tmp_path, 2)
    kept = ["best.pt", "step-00000010.pt", "step-00000011.pt", "step-00000020.pt.old"]
    assert sorted(p.name for p in tmp_path.iterdir()) == kept


def test_later_checkpoints_are_set_aside(tmp_path: Path) -> None:
    for step in (8, 9, 10):
        (tmp_path / checkpoint.step_name(step)).write_text(str(step))
    assert checkpoint.set_aside_later(tmp_path, 10) == []
    moved = checkpoint.set_aside_later(tmp_path, 8)
    assert [p.name for p in moved] == ["step-00000009.pt.old", "step-00000010.pt.old"]
    assert [p.read_text() for p in moved] == ["9", "10"]
    assert checkpoint.step_checkpoints(tmp_path) == [tmp_path / "step-00000008.pt"]


def test_the_average_is_the_mean_in_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    # large and nearly equal values: a sum in float32 would lose the differences
    states = [
        {
            "a": 1e4 + torch.randn(50, generator=generator),
            "b": torch.randn(3, 2, generator=generator),
            "n": torch.tensor(5),
        }
        for _ in range(7)
    ]
    copies = [{name: value.clone() for name, value in state.items()} for state in states]
    means = list(checkpoint.running_averages(iter(states)))
    assert len(means) == 7
    for count, mean in enumerate(means, 1):
        for name in ("a", "b"):
            expected = torch.stack([state[name].double() for state in states[:count]]).mean(0).float()
            assert mean[name].dtype == torch.float32 and torch.equal(mean[name], expected)
        assert mean["n"] == 5 and mean["n"].dtype == torch.int64
    assert differences(states, copies) == []
    assert list(checkpoint.running_averages([])) == []


# -- loading a model --------------------------------------------------------------------------------------------------

TEXTS = ["ONE TWO THREE", "FOUR FIVE"]


@pytest.mark.parametrize("kind", ["word", "char", "bpe", "unigram"])
def test_model_tokenizer_and_configuration_come_back(tmp_path: Path, kind: str) -> None:
    tokenizer = Tokenizer.train(TEXTS, TokenizerConfig(kind, 16))  # type: ignore[arg-type]
    config = experiment(
        "model.ctc=true", "seed=5", "optim.betas=[0.7, 0.9]", 'name="ünï: yes"', f"tokenizer.kind={kind}"
    )
    model = Transducer(config.model, tokenizer.vocab_size, torch.full((80,), -3.5), torch.full((80,), 0.25))
    payload = checkpoint.make_payload(model.state_dict(), config, tokenizer, step=30, epoch=4)
    atomic_save(payload, tmp_path / "a.pt")
    loaded = checkpoint.load(str(tmp_path / "a.pt"))
    assert (loaded.step, loaded.epoch, loaded.format_version) == (30, 4, FORMAT_VERSION)
    assert isinstance(loaded.config, Experiment) and loaded.config == config
    assert not any(module.training for module in loaded.model.modules())
    assert differences(loaded.model.state_dict(), model.state_dict()) == []
    assert loaded.tokenizer.symbols == tokenizer.symbols
    assert [loaded.tokenizer.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]
    features, lens = torch.randn(1, 67, 80, generator=torch.Generator().manual_seed(0)), torch.tensor([67])
    with torch.no_grad():
        outputs = [m.encode(features, lens)[0] for m in (loaded.model, model.eval())]
    assert torch.equal(*outputs)


def test_settings_of_decoding_can_be_replaced(saved: Path) -> None:
    loaded = checkpoint.load(saved, overrides={"max_symbols_per_frame": 3})
    assert loaded.config.decoding == replace(experiment().decoding, max_symbols_per_frame=3)


def test_weights_of_another_model_are_refused(saved: Path) -> None:
    model = Transducer(experiment("model.joiner.dim=8", "model.ctc=true").model, TOKENIZER.vocab_size)
    with pytest.raises(
        CheckpointError, match=r"file X is of another model: \d+ tensors differ, first ctc_head.bias: absent"
    ):
        checkpoint.load_weights(model, payload_of()["model"], "file X")


def test_the_trivial_joiner_comes_back_and_is_missed_by_name(tmp_path: Path) -> None:
    config = experiment("loss.method=pruned", "loss.prune_range=3")
    torch.manual_seed(1)
    model = build_model(config, TOKENIZER.vocab_size)
    assert model.joiner.simple is not None
    path = tmp_path / "a.pt"
    atomic_save(checkpoint.make_payload(model.state_dict(), config, TOKENIZER, step=1, epoch=0), path)
    loaded = checkpoint.load(path)
    assert loaded.config == config and differences(loaded.model.state_dict(), model.state_dict()) == []
    plain = build_model(experiment(), TOKENIZER.vocab_size)
    with pytest.raises(CheckpointError, match="file X is of a model with the trivial joiner .* has not; keep the loss"):
        checkpoint.load_weights(plain, model.state_dict(), "file X")
    with pytest.raises(CheckpointError, match="file X is of a model without the trivial joiner .* has; keep the loss"):
        checkpoint.load_weights(model, plain.state_dict(), "file X")
    wider = build_model(experiment("loss.method=pruned", "model.predictor.dim=8"), TOKENIZER.vocab_size)
    with pytest.raises(CheckpointError, match="of another model"):
        checkpoint.load_weights(wider, plain.state_dict(), "file X")
    narrow = {n: v[:2] if n.startswith("joiner.simple") else v for n, v in model.state_dict().items()}
    with pytest.raises(CheckpointError, match="file X is of another model: 4 tensors differ"):
        checkpoint.load_weights(model, narrow, "file X")
