"""What the stages of a recipe will take, time and disk, from what is known before they run.

Hours are those of the prepared cuts, else the published ones of the corpus, else guessed from the sizes of audio files.
Rates are those that stages have noted in this experiment folder, and of training what its metrics say; else the ones
below, measured once on another machine: such an estimate is called a guess.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from asr.data.audio import SAMPLE_RATE_HZ
from asr.data.packed_cuts import PackedCuts
from asr.errors import UserError
from recipes.engine import Pipeline, Status

if TYPE_CHECKING:
    from recipes.stages import Recipe

DOWNLOAD_BYTES_PER_S = 10e6
PCM_BYTES_PER_S = 2 * SAMPLE_RATE_HZ
# Seconds of audio a second. Of stages that share out their work, for each process.
HEADERS_RATE = 3000.0  # prepare of a corpus that is used where it lies, AMD EPYC
WRITING_RATE = 500.0  # prepare of egs/yesno, AMD EPYC
SPEAKING_RATE = 100.0  # prepare of egs/synth
FEATURES_RATE = 700.0  # with noise and speeds, written (asr/bench/RESULTS.md, 2026-11-28)
READING_RATE = 500.0  # statistics of features on the fly
TEXT_RATE = 30000.0  # tokenizer
# of a model of so many parameters: two cores (ARCHITECTURE.md, bench/RESULTS.md), one H100 (bench/RESULTS.md)
CPU_TRAINING = 116.0, 11.9e6, "116 audio s/s of preset m on 2 cores, ARCHITECTURE.md"
CPU_DECODING = 85.0, 11.9e6, "85 times real time of preset m on 2 cores, asr/bench/RESULTS.md"
CUDA_TRAINING = {"batched": 1258.0, "samplewise": 129.0, "fused": 713.0, "pruned": 662.0}
CUDA_PARAMETERS = 30.9e6
SMALLER = 0.585  # exponent of the number of parameters from m down to s; larger models cost in proportion
LITTLE_S = 600.0
BEAM_SEARCH = 3.0  # as long as greedy search, about
AUDIO_BYTES_PER_S = {".wav": 32e3, ".flac": 17e3, ".sph": 32e3, ".mp3": 8e3, ".m4a": 8e3, ".ogg": 8e3, ".opus": 4e3}


@dataclass(frozen=True)
class Estimate:
    """Of one stage.

    seconds: None where nothing is known.
    source: where the time comes from.
    disk: bytes by what they are, below ``place``.
    """

    seconds: float | None
    source: str = ""
    disk: dict[str, float] = field(default_factory=dict)
    place: Path = Path()

    @property
    def line(self) -> str:
        """Of the plan."""
        time = "time unknown" if self.seconds is None else f"about {duration(self.seconds)}" if self.seconds else ""
        parts = [f"{time} ({self.source})" if time and self.source else time or self.source]
        parts += [f"disk: {', '.join(f'{size(n)} {what}' for what, n in self.disk.items())}"] if self.disk else []
        return "; ".join(parts)


def duration(seconds: float) -> str:
    """``2 d 3 h``, ``5 min``; two units at most."""
    if seconds < 60:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    units = ((minutes // 1440, "d"), (minutes // 60 % 24, "h"), (minutes % 60, "min"))
    first = next(index for index, (count, _) in enumerate(units) if count)
    return " ".join(f"{count} {unit}" for count, unit in units[first : first + 2] if count)


def size(count: float) -> str:
    """Bytes in decimal units, as disks are sold."""
    unit, text = next(((u, t) for u, t in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")) if count >= u), (1e3, "kB"))
    return f"{count / unit:.{0 if count >= 100 * unit else 1}f} {text}"


class Audio:
    """Seconds of audio by set, and how they are known."""

    def __init__(self, recipe: Recipe, *, prepared: bool) -> None:
        self._recipe = recipe
        counted = _counted(recipe)
        published = {split: 3600 * hours for split, hours in recipe.options.expected_hours.items()}
        if prepared and counted:
            self.seconds, self.source = counted, "counted"
        elif published:
            self.seconds, self.source = published, "expected of this corpus"
        elif counted:
            self.seconds, self.source = counted, "of the earlier run"
        else:
            total = guess_from_files(recipe.corpus_dir) if recipe.corpus_dir else 0.0
            shares = {"train": 0.9, "valid": 0.05, **dict.fromkeys(recipe.options.tests, 0.05)}
            self.seconds = {split: share * total for split, share in shares.items()} if total else {}
            self.source = "guessed from the sizes of audio files"

    @property
    def augmented_s(self) -> float:
        """Training audio at all speeds, each as often as there are copies."""
        config = self._recipe.experiment.data.augment
        return self.seconds["train"] * config.copies * sum(1 / factor for factor in config.speed_factors)

    @property
    def stored_s(self) -> float:
        """What features are stored of."""
        return self.augmented_s + sum(self.seconds.values()) - self.seconds["train"]

    def of_stage(self, name: str) -> float:
        """How much a stage works on; what is worked on several times counts as often."""
        recipe, seconds = self._recipe, self.seconds
        if name == "prepare":
            return sum(seconds.values())
        if name == "features":
            return self.stored_s if recipe.experiment.data.features.storage == "stored" else seconds["train"]
        if name == "average":
            config = recipe.experiment.average
            return seconds["valid"] * (len(config.last) + config.ema + config.best)
        if name == "decode":
            searches = 1 + BEAM_SEARCH * (recipe.experiment.decoding.search != "greedy")
            return len(recipe.chunks) * searches * sum(seconds[test] for test in recipe.options.tests)
        return seconds["train"]


def audio_of_stage(name: str, recipe: Recipe) -> float:
    """What a stage that has run has worked on, to be noted with its time."""
    return Audio(recipe, prepared=True).of_stage(name)


def _counted(recipe: Recipe) -> dict[str, float]:
    """Of the prepared cuts; empty when one of the manifests is missing or broken."""
    try:
        paths = {split: recipe.path(f"data/cuts_{split}.jsonl.gz") for split in recipe.options.splits}
        return {split: float(PackedCuts.open(path).durations_s.sum()) for split, path in paths.items()}
    except UserError:
        return {}


def guess_from_files(folder: Path) -> float:
    """Seconds of audio in the files below a folder, by their sizes and the usual rates of their kinds."""
    return sum(
        os.stat(Path(place, name)).st_size / AUDIO_BYTES_PER_S[kind]
        for place, _, names in os.walk(folder)
        for name in names
        if (kind := Path(name).suffix.lower()) in AUDIO_BYTES_PER_S and Path(place, name).is_file()
    )


def estimates(recipe: Recipe, pipeline: Pipeline, plan: dict[str, Status]) -> tuple[dict[str, Estimate], str]:
    """Of each stage of a plan that must run, by name, and the hours of audio by which; reads, and writes nothing."""
    wanted = [name for name, status in plan.items() if status.must_run]
    audio = Audio(recipe, prepared="prepare" not in wanted)
    parameters = _parameters(recipe) if {"train", "average", "decode", "export"} & set(wanted) else 0
    found = {name: _estimate(name, recipe, pipeline, audio, parameters) for name in wanted}
    hours = ", ".join(f"{split} {seconds / 3600:.2f} h" for split, seconds in audio.seconds.items())
    return found, f"audio: {hours}, {audio.source}" if hours else "audio: nobody knows how much before prepare"


def _estimate(name: str, recipe: Recipe, pipeline: Pipeline, audio: Audio, parameters: int) -> Estimate:
    if name == "download":
        return _download(recipe)
    if name in ("score", "report"):
        return Estimate(0.0, "seconds")
    weights = 4.0 * parameters
    if name in ("export", "verify"):
        exports, precisions = len(recipe.experiment.export.targets), len(recipe.experiment.export.precisions)
        if not exports:
            return Estimate(0.0, "nothing is to be exported")
        count = exports * len(recipe.experiment.export.chunk_ms) * precisions
        return Estimate(None, "", {"models": count * weights} if name == "export" else {}, recipe.exp_dir)
    if not audio.seconds:
        return Estimate(None, "no hours are known before prepare", {}, recipe.exp_dir)
    disk: dict[str, float] = {}
    if name == "prepare" and not recipe.options.in_place:
        disk = {"audio": audio.of_stage(name) * PCM_BYTES_PER_S}
    elif name == "features" and recipe.experiment.data.features.storage == "stored":
        disk = {"stored features": audio.stored_s * 100 * 4 * recipe.experiment.data.features.num_mel_bins}
    elif name == "features" and recipe.experiment.data.features.storage == "shar":
        disk = {"shards": audio.seconds["train"] * AUDIO_BYTES_PER_S[".flac"]}
    elif name == "train":
        config = recipe.experiment.training
        each = weights * (3 + (config.ema_decay > 0))  # Adam's two moments
        disk = {f"checkpoints ({config.keep_last} of {size(each)}, and the best)": config.keep_last * each + weights}
    elif name == "average":
        disk = {"weights": weights}
    if name == "train":
        seconds, source = _training(recipe, audio, parameters)
    else:
        rate, source = _measured(name, recipe, pipeline, audio) or _default(name, recipe, parameters)
        seconds = audio.of_stage(name) / rate
    return Estimate(seconds, source, disk, recipe.exp_dir)


def _download(recipe: Recipe) -> Estimate:
    if recipe.corpus_dir is not None:
        return Estimate(0.0, f"the corpus is in {recipe.corpus_dir}")
    missing = [one for one in recipe.options.archive_sizes if not (recipe.download_dir / one.folder).is_dir()]
    if not missing:
        return Estimate(0.0, "nothing to fetch")
    fetched, unpacked = sum(one.download_bytes for one in missing), sum(one.unpacked_bytes for one in missing)
    source = f"a guess: {DOWNLOAD_BYTES_PER_S / 1e6:g} MB a second"
    disk = {"to download": fetched, "unpacked": unpacked}
    return Estimate(fetched / DOWNLOAD_BYTES_PER_S, source, disk, recipe.download_dir)


def _measured(name: str, recipe: Recipe, pipeline: Pipeline, audio: Audio) -> tuple[float, str] | None:
    """The rate that the stage noted when it last ran here, on features that were stored or not as now.

    A run over a little audio is mostly its beginning and end, and says nothing about one over much.
    """
    marker = pipeline.marker(name) or {}
    storage = "experiment.data.features.storage"
    settings = marker.get("settings", {})
    if not marker.get("audio_s") or not marker.get("seconds"):
        return None
    if settings.get(storage, recipe.experiment.data.features.storage) != recipe.experiment.data.features.storage:
        return None
    if marker["audio_s"] < LITTLE_S and audio.of_stage(name) > 2 * marker["audio_s"]:
        return None
    rate = marker["audio_s"] / marker["seconds"]
    return rate, f"measured: {rate:.0f} audio s/s when it last ran"


def _default(name: str, recipe: Recipe, parameters: int) -> tuple[float, str]:
    jobs = min(recipe.num_jobs, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1)
    if name in ("average", "decode"):
        rate, at, text = CPU_DECODING
        if recipe.device != "cpu":
            rate, text = 10 * rate, "ten times what two cores decode"
        return _scaled(rate, at, parameters), f"a guess: {text}"
    if name == "prepare":
        made = recipe.corpus.NAME == "synth"
        rate = jobs * (HEADERS_RATE if recipe.options.in_place else SPEAKING_RATE if made else WRITING_RATE)
    elif name == "tokenizer":
        rate = TEXT_RATE
    elif recipe.experiment.data.features.storage == "stored":
        rate = jobs * FEATURES_RATE
    else:
        rate = READING_RATE
    return rate, f"a guess: {rate:.0f} audio s/s"


def _scaled(rate: float, at: float, parameters: int) -> float:
    """A rate of a model of ``at`` parameters, for one of another size."""
    return float(rate * (at / parameters) ** (SMALLER if parameters < at else 1.0))


def _training(recipe: Recipe, audio: Audio, parameters: int) -> tuple[float, str]:
    experiment = recipe.experiment
    config, processes = experiment.training, recipe.num_processes * recipe.nodes.count
    trained_s = config.max_epochs * audio.augmented_s
    if config.max_steps:
        trained_s = min(trained_s, config.max_steps * config.accumulation * processes * experiment.data.max_duration_s)
    rate, source = _measured_training(recipe, parameters) or (0.0, "")
    if not rate:
        if recipe.device == "cpu":  # processes share its cores
            rate, at, text = CPU_TRAINING
            rate *= recipe.nodes.count
        else:
            rate, at = processes * CUDA_TRAINING[experiment.loss.method], CUDA_PARAMETERS
            text = f"{rate:.0f} audio s/s of preset l on {processes} H100, asr/bench/RESULTS.md"
        rate = _scaled(rate, at, parameters) / (1 + config.dual_mode)
        source = f"a guess: {rate:.0f} audio s/s for {parameters / 1e6:.1f}M parameters, from {text}"
    return trained_s / rate, f"{source}; {trained_s / 3600:.1f} h with all epochs and speeds"


def _measured_training(recipe: Recipe, parameters: int) -> tuple[float, str] | None:
    """The median of the metrics of this folder's newest training of such a model, on such a device."""
    folders = [recipe.path("train"), *sorted(recipe.exp_dir.glob("train.old-*"), key=lambda p: -p.stat().st_mtime)]
    for folder in folders:
        try:
            lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            records = [json.loads(line) for line in lines]
            settings = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
            alike = (
                settings["loss"]["method"] == recipe.experiment.loss.method
                and settings["training"].get("dual_mode", False) == recipe.experiment.training.dual_mode
            )
            start = [record for record in records if record["kind"] == "start"][-1]
            alike &= start["device"].split(":")[0] == recipe.device.split(":")[0]
            alike &= start["processes"] == recipe.num_processes * recipe.nodes.count
            alike &= abs(start["parameters"] / parameters - 1) < 0.05
            rates = [record["audio_s_per_s"] for record in records if record["kind"] == "train"]
            if alike and rates:
                rate = statistics.median(rates)
                return rate, f"measured: {rate:.0f} audio s/s, median of {folder / 'metrics.jsonl'}"
        except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, yaml.YAMLError):
            continue
    return None


def _parameters(recipe: Recipe) -> int:
    """Of the model, with the tokens that there are or may be."""
    import torch

    from asr.data.tokenizer import Tokenizer
    from asr.models.transducer import build_model

    try:
        tokens = Tokenizer.load(recipe.path("tokenizer/tokenizer.json")).vocab_size
    except UserError:
        tokens = recipe.experiment.tokenizer.vocab_size
    with torch.device("meta"):
        model = build_model(recipe.experiment, tokens)
    return sum(parameter.numel() for parameter in model.parameters())


def totals(found: Iterable[Estimate]) -> list[str]:
    """Lines about all stages together: the time, and for each disk what it needs and has, with a warning where that
    is not enough."""
    every = list(found)
    known = [one for one in every if one.seconds is not None]
    unknown = f", and what is unknown of {len(every) - len(known)} stages" if len(known) < len(every) else ""
    lines = [f"all of it: about {duration(sum(one.seconds or 0.0 for one in known))}{unknown}"]
    disks: dict[int, list[Estimate]] = {}
    for one in every:
        if one.disk:
            disks.setdefault(_existing(one.place).stat().st_dev, []).append(one)
    for on_disk in disks.values():
        need = sum(sum(one.disk.values()) for one in on_disk)
        places = list(dict.fromkeys(str(one.place) for one in on_disk))
        free = shutil.disk_usage(_existing(on_disk[0].place)).free
        lines.append(f"disk of {' and '.join(places)}: {size(need)} needed, {size(free)} free")
        if need > free:
            lines.append(f"warning: {size(need - free)} too little; free some, or choose {_other(places, on_disk)}")
    return lines


def _other(places: Sequence[str], on_disk: Sequence[Estimate]) -> str:
    downloads = any("to download" in one.disk for one in on_disk)
    options = (["--download-dir"] if downloads else []) + (["--exp-dir"] if len(places) > downloads else [])
    return f"another {' or '.join(options)}"


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    return next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
