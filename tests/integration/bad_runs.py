"""The table of bad runs: what users get wrong, over the whole toolkit.

Every row is one command line on an experiment that was run to its end before, sometimes with a damage done first.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.integration.damages import (
    DENIED,
    FULL,
    READ_ONLY,
    World,
    cut_short,
    damage_all_checkpoints,
    disk_fills_while_saving,
    empty_folder,
    empty_manifest,
    failing,
    flip_a_byte,
    last_step,
    loss_without_end,
    nan_audio,
    newer_format,
    no_network,
    other_torch_file,
    other_words,
    overwrite,
    remove,
    rename_in_manifest,
    rename_recordings,
    spoil_recordings,
    truncate_a_recording,
    write,
)

RECIPE = "recipes yesno --exp-dir {exp} --corpus-dir {corpus} --num-recombined 0 --num-jobs 1"
TRAIN = (
    "asr train --config {config} --train-cuts {exp}/data/features/cuts_train.jsonl.gz "
    "--valid-cuts {exp}/data/features/cuts_valid.jsonl.gz --tokenizer {exp}/tokenizer/tokenizer.json"
)
DECODE = "asr decode --cuts {exp}/data/cuts_test.jsonl.gz --out-dir {tmp}/decoded"
TRANSCRIBE = "asr transcribe --checkpoint {exp}/train/average.pt"


@dataclass(frozen=True)
class Case:
    name: str
    command: str
    expected: tuple[str, ...]
    damage: Callable[[World], Any] | None = None
    may_change: tuple[str, ...] = field(default=())
    """Where in the experiment this command is there to write anew."""


VALID_STAGES = (
    "0 download, 1 prepare, 2 features, 3 tokenizer, 4 train, 5 average, ",
    " 5 average, 6 decode, 7 score, 8 export, 9 verify, 10 report",
)

COMMAND_LINE = [
    Case("unknown corpus", "recipes yesnoo", ("unknown corpus yesnoo", "did you mean yesno?")),
    Case("option before the corpus", "recipes --stage 2 yesno", ("name of a corpus comes first", "yesno")),
    Case("unknown option", RECIPE + " --corpus-dri x", ("unknown option --corpus-dri", "did you mean --corpus-dir")),
    Case("abbreviated option", RECIPE + " --dry", ("unknown option --dry", "did you mean --dry-run")),
    Case("option of another corpus", RECIPE + " --held-out-speaker jackson", ("unknown option --held-out-speaker",)),
    Case("option without value", RECIPE + " --seed", ("--seed", "expected one argument")),
    Case("seed that is no number", RECIPE + " --seed one", ("--seed", "'one'")),
    Case("no processes", RECIPE + " --num-jobs 0", ("--num-jobs 0", "at least 1")),
    Case("corpus option out of range", RECIPE + " --num-recombined -1", ("num_recombined=-1 is negative",)),
    Case("stage out of range", RECIPE + " --stage 11", ("stage 11 is out of range", *VALID_STAGES)),
    Case("negative stage", RECIPE + " --stop-stage -1", ("stage -1 is out of range", *VALID_STAGES)),
    Case("misspelled stage", RECIPE + " --stage tokenise", ("stage tokenise is not a stage", "did you mean tokenizer")),
    Case("stages in the wrong order", RECIPE + " --stage 4 --stop-stage 2", ("--stage 4 comes after --stop-stage 2",)),
    Case("unknown device", RECIPE + " --device gpu", ("--device gpu is unknown", "cuda")),
    Case("device that is not there", RECIPE + " --device cuda:99", ("cuda:99", "use --device cpu")),
    Case("unknown command", "asr trian", ("unknown command trian", "did you mean train")),
    Case("missing required option", "asr train --out-dir {tmp}/out", ("required", "--train-cuts")),
    Case("misspelled required option", "asr decode --chekpoint x", ("--chekpoint", "did you mean --checkpoint")),
    Case("unknown search", DECODE + " --checkpoint {best} --search bema", ("--search", "'bema'", "greedy")),
    Case("no files", TRANSCRIBE, ("required", "FILE")),
]

CONFIGURATION = [
    Case("misspelled key", RECIPE + " --set optim.lrr=1", ("'optim.lrr'", "optim.lr")),
    Case("key of the wrong group", RECIPE + " --set lr=1", ("'lr'", "optim.lr")),
    Case("wrong type", RECIPE + " --set optim.lr=fast", ("optim.lr", "fast")),
    Case("value out of range", RECIPE + " --set training.max_epochs=0", ("training.max_epochs=0", "at least 1")),
    Case("not one of the choices", RECIPE + " --set tokenizer.kind=letters", ("kind", "letters", "char")),
    Case("override without value", RECIPE + " --set optim.lr", ("'optim.lr'", "key.name=value")),
    Case("group set to a value", RECIPE + " --set optim=3", ("optim", "group of settings")),
    Case("unknown preset", RECIPE + " --set model.preset=huge", ("model.preset='huge'", "xs, s, m, l, xl, xxl")),
    Case("settings that contradict", RECIPE + " --set loss.ctc_weight=0.3", ("loss.ctc_weight=0.3", "model.ctc=true")),
    Case("missing configuration", RECIPE + " --config {tmp}/none.yaml", ("none.yaml", "does not exist")),
    Case("configuration is a folder", RECIPE + " --config {tmp}", ("cannot be read",)),
    Case("broken YAML", RECIPE + " --config {tmp}/a.yaml", ("a.yaml", "not valid YAML"), write("a.yaml", "a: [1")),
    Case("YAML without names", RECIPE + " --config {tmp}/a.yaml", ("a.yaml", "list"), write("a.yaml", "- 1\n- 2\n")),
    Case(
        "misspelled key in YAML",
        RECIPE + " --config {tmp}/a.yaml",
        ("'data.max_duration'", "a.yaml", "data.max_duration_s"),
        write("a.yaml", "data: {max_duration: 3}"),
    ),
    Case("setting of the training at decoding", DECODE + " --checkpoint {best} --set model.ctc=true", ("'model'",)),
]

CORPUS = [
    Case("missing corpus", RECIPE + " --corpus-dir {tmp}/none", ("{tmp}/none is not a folder", "--stage download")),
    Case("empty corpus", RECIPE + " --corpus-dir {tmp}/none", ("{tmp}/none is empty",), empty_folder),
    Case("corpus is a file", RECIPE + " --corpus-dir {config}", ("is not a folder",)),
    Case(
        "another corpus",
        RECIPE + " --stage download --stop-stage prepare",
        ("recordings of yesno", "--stage prepare"),
        rename_recordings,
        ("data/corpus.json",),
    ),
    Case(
        "half a corpus",
        RECIPE + " --stage download --stop-stage prepare",
        ("holds 59 recordings", "60"),
        lambda world: world.recordings()[0].unlink(),
        ("data/corpus.json",),
    ),
    Case("no network", "recipes yesno --exp-dir {tmp}/new --download-dir {tmp}/dl", ("--corpus-dir",), no_network),
    Case(
        "truncated recording under strict",
        RECIPE + " --strict --exp-dir {tmp}/new",
        ("1 of 60 rows", "strict", "truncated", "bad_rows.txt"),
        truncate_a_recording,
    ),
    Case(
        "strict on data that was prepared without",
        RECIPE + " --strict --stage download",
        ("1 of 60 rows", "strict"),
        spoil_recordings(1),
        ("data/",),
    ),
    Case(
        "more than 10% bad rows",
        RECIPE + " --exp-dir {tmp}/new",
        ("7 of 60 rows", "10.0%", "bad_rows.txt", "data.max_bad_fraction"),
        spoil_recordings(7),
    ),
    Case("only bad rows", RECIPE + " --exp-dir {tmp}/new", ("all 60 rows are bad",), spoil_recordings(60)),
]

STAGES = [
    Case(
        "no earlier outputs",
        "recipes yesno --exp-dir {tmp}/new --stage 6 --stop-stage 6",
        ("stage 6 (decode) needs", "run that first", "--exp-dir {tmp}/new"),
    ),
    Case(
        "one earlier output gone",
        RECIPE + " --stage train --force",
        ("tokenizer.json", "stage 3 (tokenizer) makes", "--stage tokenizer --stop-stage train"),
        remove("tokenizer/tokenizer.json"),
    ),
    Case(
        "broken tokenizer",
        RECIPE + " --stage train --force",
        ("stage 4 (train) failed", "tokenizer.json", "--stage train"),
        overwrite("tokenizer/tokenizer.json", "{"),
    ),
    Case(
        "broken statistics",
        RECIPE + " --stage train --force",
        ("stage 4 (train) failed", "stats.json", "--stage train"),
        overwrite("data/features/stats.json", "[]"),
    ),
    Case(
        "stored features gone",
        RECIPE + " --stage train --force",
        ("stage 4 (train) failed", "features-9", "run the features stage"),
        rename_in_manifest("data/features/cuts_train.jsonl.gz", "features-0", "features-9"),
    ),
    Case(
        "stored features of other settings",
        RECIPE + " --stage train --set data.features.tail_chunk_ms=640",
        ("stage 4 (train) failed", "tail_chunk_ms=640", "run the features stage again"),
    ),
    Case(
        "loss that is no number",
        RECIPE + " --stage train --force --set training.max_bad_batches=1",
        ("stage 4 (train) failed", "training.max_bad_batches=1", "non-finite loss"),
        loss_without_end,
    ),
    Case(
        "empty manifest",
        RECIPE + " --stage train --force",
        ("stage 4 (train) failed", "cuts_train.jsonl.gz", "no cuts"),
        empty_manifest("data/features/cuts_train.jsonl.gz"),
    ),
    Case(
        "damaged manifest",
        RECIPE + " --stage features --force",
        ("stage 2 (features) failed", "cuts_train.jsonl.gz"),
        cut_short("data/cuts_train.jsonl.gz"),
    ),
    Case(
        "too many tokens for the texts",
        RECIPE + " --stage tokenizer --set tokenizer.kind=bpe --set tokenizer.vocab_size=3000",
        ("stage 3 (tokenizer) failed", "vocab_size", "--set tokenizer.vocab_size=3000 --stage tokenizer"),
    ),
    Case(
        "all checkpoints damaged",
        RECIPE + " --stage average --force",
        ("stage 5 (average) failed", "no whole checkpoint", "train stage"),
        damage_all_checkpoints,
    ),
    Case(
        "damaged average",
        RECIPE + " --stage decode --force",
        ("stage 6 (decode) failed", "average.pt is corrupt", "best.pt is whole"),
        flip_a_byte("train/average.pt"),
    ),
]

FILES = [
    Case("cuts missing", TRAIN.replace("cuts_train", "cuts_trian") + " --out-dir {tmp}/out", ("cuts_trian.jsonl.gz",)),
    Case(
        "cuts that are no manifest",
        TRAIN + " --out-dir {tmp}/out --valid-cuts {config}",
        ("tiny.yaml",),
    ),
    Case(
        "empty cuts",
        TRAIN + " --out-dir {tmp}/out",
        ("cuts_train.jsonl.gz holds no cuts",),
        empty_manifest("data/features/cuts_train.jsonl.gz"),
    ),
    Case("tokenizer missing", TRAIN + " --out-dir {tmp}/out --tokenizer {tmp}/t.json", ("{tmp}/t.json",)),
    Case(
        "words that the tokenizer lacks",
        TRAIN + " --out-dir {tmp}/out --tokenizer {tmp}/words.json",
        ("all 30 rows are bad", "is not in the tokenizer", "bad_rows.txt"),
        other_words,
    ),
    Case("resume from nothing", TRAIN + " --out-dir {tmp}/out --resume {tmp}/no.pt", ("{tmp}/no.pt does not exist",)),
    Case(
        "resume from another model",
        TRAIN + " --out-dir {tmp}/out --set model.joiner.dim=32 --resume {step}",
        ("another model", "joiner"),
    ),
    Case(
        "resume from an average",
        TRAIN + " --out-dir {tmp}/out --resume {exp}/train/average.pt",
        ("average.pt", "checkpoints/"),
    ),
    Case(
        "resume from a damaged checkpoint",
        TRAIN + " --out-dir {tmp}/out --resume {step}",
        ("is corrupt", "is whole, use that one"),
        lambda world: os.truncate(last_step(world.exp), 5000),
    ),
    Case("checkpoint missing", DECODE + " --checkpoint {exp}/train/bets.pt", ("bets.pt does not exist", "is whole")),
    Case("checkpoint is text", DECODE + " --checkpoint {config}", ("tiny.yaml is corrupt or no checkpoint",)),
    Case("another torch file", DECODE + " --checkpoint {tmp}/other.pt", ("no checkpoint of this",), other_torch_file),
    Case("newer checkpoint", DECODE + " --checkpoint {tmp}/newer.pt", ("format version 99", "reads 1"), newer_format),
    Case("cuts to decode missing", DECODE + " --checkpoint {best} --cuts {tmp}/c.jsonl", ("does not exist",)),
    Case(
        "audio of cuts missing",
        DECODE + " --checkpoint {best}",
        (".gone.wav", "does not exist"),
        rename_in_manifest("data/cuts_test.jsonl.gz", ".wav", ".gone.wav"),
    ),
    Case("audio file missing", TRANSCRIBE + " {tmp}/none.wav", ("{tmp}/none.wav", "the file does not exist")),
    Case("audio file is text", TRANSCRIBE + " {config}", ("tiny.yaml", "not readable as audio")),
    Case("audio file is empty", TRANSCRIBE + " {tmp}/e.wav", ("e.wav", "the file is empty"), write("e.wav", "")),
    Case("folder without audio", TRANSCRIBE + " {exp}/tokenizer", ("{exp}/tokenizer holds no audio files",)),
    Case("audio that is not finite", TRANSCRIBE + " {tmp}/nan.wav", ("nan.wav", "finite"), nan_audio),
    Case("average of nothing", "asr average --train-dir {tmp} --valid-cuts {valid}", ("no whole checkpoint",)),
    Case("average of no folder", "asr average --train-dir {tmp}/none --valid-cuts {valid}", ("{tmp}/none", "folder")),
    Case("average of none", "asr average --train-dir {exp}/train --valid-cuts {valid} --last 0", ("--last 0",)),
]

DISK = [
    Case("experiment below a file", RECIPE + " --exp-dir {config}/exp", ("tiny.yaml", "file, not a folder")),
    Case(
        "experiment that may not be written",
        RECIPE + " --exp-dir {tmp}/new",
        ("permission denied", "choose a folder that you may write"),
        failing(DENIED, lambda name: "/new/" in name),
    ),
    Case(
        "read-only disk",
        RECIPE + " --stage tokenizer --force",
        ("stage 3 (tokenizer) failed", "read-only", "--stage tokenizer"),
        failing(READ_ONLY, lambda name: "/tokenizer/" in name),
    ),
    Case(
        "disk full at features",
        RECIPE + " --stage features --stop-stage features --force",
        ("stage 2 (features) failed", "no space left"),
        failing(FULL, lambda name: "/features/" in name),
    ),
    Case(
        "disk full at a checkpoint",
        RECIPE + " --stage train --force",
        ("stage 4 (train) failed", "no space left", "--stage train"),
        disk_fills_while_saving,
    ),
    Case(
        "disk full at the average",
        RECIPE + " --stage average --force",
        ("stage 5 (average) failed", "no space left"),
        disk_fills_while_saving,
    ),
    Case(
        "disk full at the results",
        RECIPE + " --stage decode --force",
        ("stage 6 (decode) failed", "no space left"),
        failing(FULL, lambda name: "/decode/" in name),
    ),
    Case(
        "output folder is a file",
        DECODE.replace("{tmp}/decoded", "{config}") + " --checkpoint {best}",
        ("tiny.yaml",),
    ),
]

CASES = [*COMMAND_LINE, *CONFIGURATION, *CORPUS, *STAGES, *FILES, *DISK]
