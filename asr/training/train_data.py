"""From manifests on disk to what the trainer takes: cuts without bad rows, tokenizer, feature statistics."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from lhotse import MonoCut

from asr.atomic import write_whole
from asr.config import Experiment
from asr.data.augmentation import check_recordings
from asr.data.bad_rows import BadRow, report_bad_rows
from asr.data.features import FeatureStats, check_stored_features
from asr.data.manifests import checked_cuts
from asr.data.packed_cuts import JoinedCuts, PackedCuts
from asr.data.shar import check_shards
from asr.data.tokenizer import Tokenizer, TokenizerConfig
from asr.errors import UserError
from asr.training.ranks import place

_FORMAT = 1  # of the notes


@dataclass
class TrainData:
    """Cuts that training may see, and what was made from them. ``stats`` None leaves features unscaled; ``num_valid``
    counts validation cuts with those that were left out, 0 where nobody knows."""

    train_cuts: Any
    valid_cuts: Any
    tokenizer: Tokenizer
    stats: FeatureStats | None = None
    num_valid: int = 0


def load_train_data(
    experiment: Experiment,
    train_cuts: Path,
    valid_cuts: Path | None,
    tokenizer: Tokenizer,
    stats: FeatureStats | None,
    out: Path,
    *,
    note: bool = True,
) -> TrainData:
    """Reads the manifests, those of ``data.more_cuts`` too, and leaves out what training cannot use.

    The reasons are in ``out / "bad_rows.txt"``.

    Without ``valid_cuts`` there is nothing to validate on. With ``note``, what was found is noted in ``out``, and a
    training that goes on does not look at all cuts again.

    Raises:
        UserError: a manifest that cannot be used; shards that are not there or not whole; recordings for augmentation
            that are not there or broken; bad rows under ``data.strict``, or too many of them.
    """
    # stored features are used without the audio, which may be gone by now
    on_the_fly = experiment.data.features.storage != "stored"
    if on_the_fly:
        checked = out / "checked-recordings.txt" if note else None
        check_recordings(experiment.data.augment, headers=place().first, note=checked)
    # stored features hold every speed already, each as a cut of its own
    fastest = max(experiment.data.augment.speed_factors) if on_the_fly else 1.0
    more = {Path(path): share for path, share in experiment.data.more_cuts.items()}
    asked = [("train", train_cuts, fastest), *([("valid", valid_cuts, 1.0)] if valid_cuts is not None else [])]
    asked += [(f"more-{number}", path, fastest) for number, path in enumerate(more, 1)]
    bad: list[BadRow] = []
    good = []
    total = num_valid = 0
    for name, path, max_speed in asked:
        cuts = PackedCuts.open(path)
        total += len(cuts)
        num_valid = len(cuts) if name == "valid" else num_valid
        found = _check(cuts, path, max_speed, tokenizer, experiment, out / f"checked-{name}.npz" if note else None)
        bad += found.bad
        kept = cuts if len(found.usable) == len(cuts) else cuts.keep(found.usable.tolist())
        kept.tokens = found.tokens
        good.append(kept)
    config = experiment.data
    report_bad_rows(bad, total, config.strict, config.max_bad_fraction, out / "bad_rows.txt")
    if bad and place().first:
        print(f"left out {len(bad)} of {total} cuts, reasons in {out / 'bad_rows.txt'}", flush=True)
    for (_, path, _), kept in zip(asked, good, strict=True):
        if len(kept) == 0:
            raise UserError(f"all cuts of {path} are bad; reasons in {out / 'bad_rows.txt'}")
    train, valid, *others = good if valid_cuts is not None else [good[0], PackedCuts(), *good[1:]]
    together = JoinedCuts([train, *others], [1.0, *more.values()]) if others else train
    if config.features.storage == "shar":
        check_shards(together.shards()[1], config.shar)
    return TrainData(together, valid, tokenizer, stats, num_valid)


class _Found(NamedTuple):
    """Of a manifest: the numbers of usable cuts, int64 [N], how many tokens each has, int32 [N], and the bad rows."""

    usable: np.ndarray
    tokens: np.ndarray
    bad: list[BadRow]


def _check(
    cuts: PackedCuts, path: Path, max_speed: float, tokenizer: Tokenizer, experiment: Experiment, note: Path | None
) -> _Found:
    """Looks at every cut, or at a note of an earlier time.

    A note of another manifest, tokenizer or setting does not count, nor one by which a cut is bad that is not so now.
    """
    on_the_fly = experiment.data.features.storage != "stored"
    asked = [hashlib.sha256(path.read_bytes()).hexdigest(), str(path), max_speed, on_the_fly]
    features = dataclasses.asdict(experiment.data.features)
    key = hashlib.sha256(json.dumps([_FORMAT, asked, tokenizer.to_state(), features]).encode()).hexdigest()
    check = partial(
        checked_cuts,
        tokenizer=tokenizer,
        config=experiment.data.features,
        max_speed=max_speed,
        source=path,
        check_audio=on_the_fly,
    )
    known = None if note is None else _noted(note, key)
    if known is not None:
        left_out = np.setdiff1d(np.arange(len(cuts)), known.usable).tolist()
        if all(one.bad is not None for one in check(cuts[number] for number in left_out)):
            return known
    usable, tokens, bad = [], [], []
    for number, one in enumerate(check(cuts)):
        if one.bad is not None:
            bad.append(one.bad)
            continue
        if not on_the_fly:
            check_stored_features([one.cut], experiment.data.features)
        usable.append(number)
        tokens.append(one.tokens)
    found = _Found(np.array(usable, np.int64), np.array(tokens, np.int32), bad)
    if note is not None and place().first:
        rows = json.dumps([dataclasses.astuple(row) for row in bad])
        note.parent.mkdir(parents=True, exist_ok=True)
        write_whole(
            note, lambda file: np.savez_compressed(file, key=key, usable=found.usable, tokens=found.tokens, bad=rows)
        )
    return found


def _noted(note: Path, key: str) -> _Found | None:
    """What was noted under this key; None where there is no such note, or one that cannot be read."""
    try:
        with np.load(note, allow_pickle=False) as arrays:
            if str(arrays["key"]) != key:
                return None
            bad = [BadRow(*row) for row in json.loads(str(arrays["bad"]))]
            return _Found(arrays["usable"], arrays["tokens"], bad)
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error):
        return None


def learn_tokenizer(cuts: Iterable[MonoCut], config: TokenizerConfig) -> Tokenizer:
    """A tokenizer of the training texts."""
    return Tokenizer.train([part.text for cut in cuts for part in cut.supervisions if part.text], config)
