"""How fast a preset trains: the trainer's own step on random features, timed part by part.

    python -m asr.training.benchmark --preset s --precision bf16 --utterance-s 6 --method pruned

Nothing is read from disk: the loader runs in processes of its own. Peak memory is that of the whole process: one call
measures one method.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from asr.cli.guard import Parser, guarded
from asr.config import load_experiment
from asr.data.batch import Batch
from asr.data.tokenizer import BLANK, SPACE, Tokenizer
from asr.errors import UserError
from asr.models.presets import PRESETS
from asr.models.transducer import parameter_counts
from asr.training.faults import BadBatches
from asr.training.memory import peak_bytes
from asr.training.ranks import Ranks
from asr.training.trainer import TrainData, Trainer
from losses import LOSSES

FRAMES_PER_S = 100
# a part ends where the next begins; all together are the step
PARTS = ("prepare", "encoder forward", "loss forward", "loss backward", "encoder backward", "optimizer")
LOSS_PARTS = ("loss forward", "loss backward")


@dataclass
class Timing:
    """Medians over the timed steps.

    Args:
        step_s: seconds of a step.
        audio_s_per_s: audio seconds that are trained in a second.
        parts_s: seconds of each of PARTS.
    """

    step_s: float
    audio_s_per_s: float
    parts_s: dict[str, float]

    @property
    def loss_share(self) -> float:
        """The predictor, the joiner and the loss, as a fraction of the step."""
        return sum(self.parts_s[name] for name in LOSS_PARTS) / sum(self.parts_s.values())


class PartTimer:
    """Notes when the parts of a trainer's step end, through hooks that leave the step as it is."""

    def __init__(self, trainer: Trainer):
        self.seconds: dict[str, list[float]] = {name: [] for name in PARTS}
        self._marks: dict[str, float] = {}
        model = trainer.model
        model.register_forward_pre_hook(lambda *_: self._mark("prepare"))
        model.encoder.register_forward_hook(self._encoded)
        model.register_forward_hook(lambda *_: self._mark("loss forward"))
        for parameter in model.parameters():  # the last one ends the backward pass
            parameter.register_post_accumulate_grad_hook(lambda _: self._mark("encoder backward"))

    def _mark(self, part: str) -> None:
        self._marks[part] = time.perf_counter()

    def _encoded(self, module: Any, inputs: Any, output: tuple[torch.Tensor, torch.Tensor]) -> None:
        self._mark("encoder forward")
        # autograd runs what came later in the forward pass first: the predictor is done by then
        output[0].register_hook(lambda _: self._mark("loss backward"))

    def step(self, trainer: Trainer, batch: Batch, bad: BadBatches) -> float:
        """Seconds of one optimizer step."""
        start = time.perf_counter()
        trainer.step([batch], bad)
        self._mark("optimizer")
        before = start
        for name in PARTS:
            self.seconds[name].append(self._marks[name] - before)
            before = self._marks[name]
        return before - start


def random_batch(audio_s: float, utterance_s: float, tokens_per_s: float, vocab_size: int, num_bins: int) -> Batch:
    """A batch of a length bucket: utterances of 0.9 to 1 times the longest, utterance_s on average.

    Args:
        audio_s: audio in the batch, rounded to whole utterances.
        utterance_s: mean length of an utterance.
        tokens_per_s: tokens in a second of audio.
        vocab_size: V.
        num_bins: F.
    """
    generator = torch.Generator().manual_seed(0)
    size = max(1, round(audio_s / utterance_s))
    durations_s = utterance_s * torch.linspace(18 / 19, 20 / 19, size)[torch.randperm(size, generator=generator)]
    feature_lens = (durations_s * FRAMES_PER_S).round().long().clamp(min=7)
    # "modified" spends a frame on each token
    target_lens = torch.minimum((durations_s * tokens_per_s).round().long(), (feature_lens - 3) // 4)
    features = torch.randn(size, int(feature_lens.max()), num_bins, generator=generator)
    targets = torch.randint(1, vocab_size, (size, int(target_lens.max())), generator=generator)
    for row in range(size):
        features[row, feature_lens[row] :] = 0.0
        targets[row, target_lens[row] :] = 0
    names = [f"random-{row}" for row in range(size)]
    return Batch(features, feature_lens, targets, target_lens, names, [""] * size, durations_s.tolist())


def make_trainer(
    preset: str,
    precision: str,
    vocab_size: int,
    out_dir: Path,
    overrides: Sequence[str] = (),
    device: str = "cpu",
    ranks: Ranks | None = None,
    longest_s: float = 1e6,
) -> Trainer:
    """A trainer with random weights; out_dir stays empty but for the folder of its checkpoints.

    longest_s: the one cut of its data, by which a limit of memory is planned.
    """
    settings = [f"model.preset={preset}", f"training.precision={precision}", *overrides]
    tokenizer = Tokenizer("word", [BLANK, *(f"{SPACE}token{i}" for i in range(1, vocab_size))])
    cuts = [SimpleNamespace(duration=longest_s, supervisions=[SimpleNamespace(text=" ".join(["token1"] * 40))])]
    data = TrainData(cuts, cuts, tokenizer)
    return Trainer(load_experiment(overrides=settings), data, out_dir, device, ranks=ranks)


def measure(trainer: Trainer, batch: Batch, steps: int, warmup: int = 3) -> Timing:
    """Times ``steps`` steps on the same batch, after ``warmup`` others that compile kernels and fill caches."""
    bad = BadBatches(trainer.out_dir, 0, 0, lambda **_: None, lambda text: print(text, file=sys.stderr))
    trainer.model.train()
    for _ in range(warmup):
        trainer.step([batch], bad)
    timer = PartTimer(trainer)
    step_s = statistics.median(timer.step(trainer, batch, bad) for _ in range(steps))
    parts_s = {name: statistics.median(values) for name, values in timer.seconds.items()}
    return Timing(step_s, sum(batch.durations_s) / step_s, parts_s)


def profile(trainer: Trainer, batch: Batch, steps: int, rows: int) -> str:
    """torch.profiler's table of operators by their own time on CPU."""
    bad = BadBatches(trainer.out_dir, 0, 0, lambda **_: None, print)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        for _ in range(steps):
            trainer.step([batch], bad)
    table: str = profiler.key_averages().table("self_cpu_time_total", row_limit=rows, max_name_column_width=60)
    return table


def _parser() -> Parser:
    parser = Parser(prog="python -m asr.training.benchmark", description=__doc__)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="s")
    parser.add_argument("--method", choices=list(LOSSES), help="the same as --set loss.method=METHOD")
    parser.add_argument("--audio-s", type=float, default=100.0, help="audio seconds in a batch")
    parser.add_argument("--utterance-s", type=float, default=6.0, help="mean length of an utterance in seconds")
    parser.add_argument("--tokens-per-s", type=float, default=3.0)
    parser.add_argument("--vocab-size", type=int, default=500)
    parser.add_argument("--precision", choices=("auto", "bf16", "fp16", "fp32"), default="auto")
    parser.add_argument("--steps", type=int, default=20, help="timed steps; medians are printed")
    parser.add_argument("--threads", type=int, default=0, help="threads of torch; 0 leaves its own choice")
    parser.add_argument("--profile", type=int, default=0, metavar="ROWS", help="also print the profiler's top rows")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="configuration override")
    return parser


def _run(argv: Sequence[str]) -> int:
    args: argparse.Namespace = _parser().parse_args(list(argv))
    if min(args.audio_s, args.utterance_s, args.tokens_per_s) <= 0 or args.vocab_size < 2 or args.steps < 1:
        raise UserError(
            "--audio-s, --utterance-s and --tokens-per-s must be above 0, --vocab-size at least 2, --steps at least 1"
        )
    if args.threads > 0:
        torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        overrides = [*args.set, *([f"loss.method={args.method}"] if args.method else [])]
        trainer = make_trainer(args.preset, args.precision, args.vocab_size, Path(folder), overrides)
        model = trainer.model
        num_bins = model.config.num_mel_bins
        batch = random_batch(args.audio_s, args.utterance_s, args.tokens_per_s, args.vocab_size, num_bins)
        timing = measure(trainer, batch, args.steps)
        print(
            f"preset {args.preset}, {parameter_counts(model)['total']:,} parameters, {trainer.precision},"
            f" loss {trainer.experiment.loss.method},"
            f" {torch.get_num_threads()} threads, {batch.size} utterances, {sum(batch.durations_s):.0f} s of audio"
        )
        print(f"{timing.audio_s_per_s:.1f} audio s/s ({1e3 * timing.step_s:.1f} ms a step)")
        for name, seconds in timing.parts_s.items():
            print(f"  {name:<17}{1e3 * seconds:8.1f} ms {100 * seconds / timing.step_s:5.1f}%")
        print(f"  loss, both ways  {100 * timing.loss_share:5.1f}%")
        if (peak := peak_bytes()) is not None:
            print(f"peak memory of the process: {peak / 2**20:.0f} MiB")
        if args.profile:
            print(profile(trainer, batch, 5, args.profile))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark and returns its exit code."""
    words = sys.argv[1:] if argv is None else argv
    return guarded(lambda: _run(words))


if __name__ == "__main__":
    sys.exit(main())
