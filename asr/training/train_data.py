"""From manifests on disk to what the trainer takes: cuts without bad rows, tokenizer, feature statistics."""

from __future__ import annotations

from pathlib import Path

from asr.config import Experiment
from asr.data.bad_rows import BadRow, report_bad_rows
from asr.data.features import FeatureStats, check_stored_features
from asr.data.manifests import checked_cuts
from asr.data.packed_cuts import PackedCuts
from asr.data.tokenizer import Tokenizer
from asr.errors import UserError
from asr.training.ranks import place
from asr.training.trainer import TrainData


def load_train_data(
    experiment: Experiment,
    train_cuts: Path,
    valid_cuts: Path,
    tokenizer: Tokenizer,
    stats: FeatureStats | None,
    out: Path,
) -> TrainData:
    """Reads both manifests and leaves out what training cannot use, with the reasons in ``out / "bad_rows.txt"``.

    Raises:
        UserError: a manifest that cannot be used; bad rows under ``data.strict``, or too many of them.
    """
    # stored features are used without the audio, which may be gone by now
    on_the_fly = experiment.data.features.storage != "stored"
    # stored features hold every speed already, each as a cut of its own
    speeds = max(experiment.data.augment.speed_factors) if on_the_fly else 1.0, 1.0
    bad: list[BadRow] = []
    good = []
    total = 0
    for path, max_speed in zip((train_cuts, valid_cuts), speeds, strict=True):
        cuts = PackedCuts.open(path)
        total += len(cuts)
        usable: list[int] = []
        checked = checked_cuts(
            cuts, tokenizer, experiment.data.features, max_speed=max_speed, source=path, check_audio=on_the_fly
        )
        for number, (cut, row) in enumerate(checked):
            if row is not None:
                bad.append(row)
                continue
            usable.append(number)
            if not on_the_fly:
                check_stored_features([cut], experiment.data.features)
        good.append(cuts if len(usable) == len(cuts) else cuts.keep(usable))
    config = experiment.data
    report_bad_rows(bad, total, config.strict, config.max_bad_fraction, out / "bad_rows.txt")
    if bad and place().first:
        print(f"left out {len(bad)} of {total} cuts, reasons in {out / 'bad_rows.txt'}", flush=True)
    for path, kept in zip((train_cuts, valid_cuts), good, strict=True):
        if len(kept) == 0:
            raise UserError(f"all cuts of {path} are bad; reasons in {out / 'bad_rows.txt'}")
    return TrainData(good[0], good[1], tokenizer, stats)
