"""The stages that all corpora share, from the download to the word error rate.

Layout of an experiment folder::

    data/corpus.json  data/audio/  data/cuts_<set>.jsonl.gz  data/{bad_rows.txt,checksums.json}  download, prepare
    data/features/cuts_<set>.jsonl.gz  data/features/stats.json  data/features/<set>/            features
    tokenizer/tokenizer.json  tokenizer/tokens.txt                                               tokenizer
    train/checkpoints/  train/best.pt  train/metrics.jsonl  train/report.html                    train
    train/average.pt                                                                             average
    decode/<search>[-<chunk>]/{recogs,errs,wer-summary}-<test set>.txt  decode/wer-by-chunk.txt  decode
    export/<target>-<chunk>/                                                                     export
    verify/<target>-<chunk>/verify.{json,html}                                                   verify

Sets are train, valid, and the test sets of the corpus: mostly one, test.

Two seeds: ``--seed`` is ``Experiment.seed`` and belongs to the training alone. ``--data-seed`` (0 unless given) makes
the prepared data and its stored augmentation, so that trainings with several seeds are tested on the same list.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from asr.cli.guard import stopped_by_sigterm
from asr.config import Experiment, load_experiment, to_dict
from asr.data.augmentation import check_recordings
from asr.data.bad_rows import BadRow, report_bad_rows
from asr.data.dask_cluster import check_dask, dask_executor
from asr.data.manifests import load_cuts, save_cuts
from asr.device import resolve_device
from asr.errors import Terminated, UserError
from asr.export import TARGETS
from asr.models.context import Milliseconds
from asr.training.fine_tuning import begin_file
from asr.training.launch import Nodes, check_processes
from recipes.corpora import CORPORA, Corpus
from recipes.corpora.base import CorpusOptions
from recipes.corpora.files import files_of, state_of
from recipes.decoding import chosen_chunks, decoded_files, print_decoded, run_decode, run_score, score_files
from recipes.engine import DONE_DIR, Pipeline, Stage, StageStopped, write_atomic
from recipes.estimates import audio_of_stage
from recipes.launch import average_on_processes, train_on_processes
from recipes.results_page import PAGE, TEXT, run_report
from recipes.sounds import SOUNDS, Chosen, chosen_sounds

if TYPE_CHECKING:
    from lhotse import CutSet

    from asr.checkpoint import Loaded

CORPUS_FILE = "data/corpus.json"
CHECKSUMS_FILE = "data/checksums.json"


@dataclass(frozen=True)
class Recipe:
    """What every stage gets: the corpus, the folders, and the configuration."""

    corpus: Corpus
    options: CorpusOptions
    exp_dir: Path
    download_dir: Path
    corpus_dir: Path | None
    experiment: Experiment
    data_seed: int
    device: str
    num_jobs: int
    command: str
    dask: str | None = None
    num_processes: int = 1
    nodes: Nodes = Nodes()
    chunks: Sequence[Milliseconds] = ("full",)
    sounds: tuple[Chosen, ...] = ()

    def path(self, name: str) -> Path:
        """A path of the experiment folder."""
        return self.exp_dir / name

    def cuts(self, split: str, *, features: bool) -> CutSet:
        """The cuts of a split, as prepared or with features."""
        return load_cuts(self.path(f"data/{'features/' * features}cuts_{split}.jsonl.gz"))


def run_download(recipe: Recipe) -> None:
    """Fetches the corpus, or takes the folder that the user has; leaves a note of where it is. So with recordings for
    augmentation, which are looked through here, long before training wants them."""
    folder = recipe.corpus_dir
    if folder is None:
        folder = recipe.corpus.download(recipe.download_dir, recipe.options)
    elif not folder.is_dir():
        raise UserError(f"--corpus-dir {folder} is not a folder; pass the unpacked corpus, or leave it out to download")
    elif not any(folder.iterdir()):
        raise UserError(f"--corpus-dir {folder} is empty; pass the unpacked corpus, or leave it out to download")
    note = {"corpus_dir": str(folder.absolute()), "given": recipe.corpus_dir is not None}
    write_atomic(recipe.path(CORPUS_FILE), json.dumps(note) + "\n")
    print(f"  corpus: {folder}", flush=True)
    for sounds in recipe.sounds:
        print(f"  {sounds.name}: {sounds.settle()}", flush=True)
    check_recordings(recipe.experiment.data.augment)


def run_prepare(recipe: Recipe) -> None:
    """Writes cuts of all sets, and 16 kHz audio where the corpus has none."""
    folder = Path(json.loads(recipe.path(CORPUS_FILE).read_text(encoding="utf-8"))["corpus_dir"])
    prepared = recipe.corpus.prepare(
        folder, recipe.path("data"), seed=recipe.data_seed, options=recipe.options, num_jobs=recipe.num_jobs
    )
    for line in prepared.summary():
        print(f"  {line}", flush=True)
    write_atomic(recipe.path(CHECKSUMS_FILE), json.dumps(prepared.checksums, indent=1) + "\n")
    config = recipe.experiment.data
    path = recipe.path("data/bad_rows.txt")
    report_bad_rows(prepared.bad_rows, prepared.num_rows, config.strict, config.max_bad_fraction, path)
    for split in recipe.options.splits:
        if prepared.counts[split] == 0:
            raise UserError(f"no {split} utterances in {folder}; reasons in {path}")
    if prepared.preflight is not None:
        from recipes.corpora.preflight_page import write_page

        for line in write_page(prepared, prepared.preflight, recipe.experiment, recipe.device):
            print(f"  {line}", flush=True)


def run_features(recipe: Recipe) -> None:
    """Computes features of all splits (augmented copies for training) or writes training audio as shards, and the
    statistics of the training features."""
    from asr.data.features import compute_features, compute_stats
    from asr.data.shar_writing import write_shards

    config = recipe.experiment.data
    bad: list[BadRow] = []
    total = 0
    with nullcontext() if recipe.dask is None else dask_executor(recipe.dask) as executor:
        for split in recipe.options.splits:
            cuts = recipe.cuts(split, features=False)
            total += len(cuts)
            out, jobs, seed = recipe.path(f"data/features/{split}"), recipe.num_jobs, recipe.data_seed
            if config.features.storage == "stored":
                augment = config.augment if split == "train" else None
                cuts = compute_features(
                    cuts, out, config.features, augment, seed, jobs, bad_rows=bad, executor=executor
                )
            elif config.features.storage == "shar" and split == "train":
                cuts = write_shards(cuts, out, config.features, seed, jobs, bad_rows=bad)
            save_cuts(cuts, recipe.path(f"data/features/cuts_{split}.jsonl.gz"))
            print(f"  {split}: {len(cuts)} cuts", flush=True)
    path = recipe.path("data/features/bad_rows.txt")
    report_bad_rows(bad, total, config.strict, config.max_bad_fraction, path)
    stats = compute_stats(recipe.cuts("train", features=True), config.features)
    stats.save(recipe.path("data/features/stats.json"))


def run_tokenizer(recipe: Recipe) -> None:
    """Learns the tokenizer from the training texts."""
    from asr.data.tokenizer import Tokenizer

    texts = [part.text for cut in recipe.cuts("train", features=False) for part in cut.supervisions]
    tokenizer = Tokenizer.train(texts, recipe.experiment.tokenizer)
    recipe.path("tokenizer").mkdir(parents=True, exist_ok=True)
    tokenizer.save(recipe.path("tokenizer/tokenizer.json"))
    tokenizer.write_tokens_txt(recipe.path("tokenizer/tokens.txt"))
    print(f"  {tokenizer.vocab_size} tokens, blank included", flush=True)


def check_beginning(recipe: Recipe) -> None:
    """Whether a new training finds the checkpoint whose weights it is to begin with, and recordings for augmentation.

    Raises:
        UserError: the checkpoint is not there or no checkpoint, or it is of the training that this one sets aside; or
            there are no recordings.
    """
    from asr import checkpoint

    if recipe.experiment.data.features.storage != "stored":
        check_recordings(recipe.experiment.data.augment, headers=False)
    given = recipe.experiment.training.init_from
    if given is None:
        return
    checkpoint.outline(Path(given))
    if Path(given).resolve().is_relative_to(recipe.path("train").resolve()):
        raise UserError(
            f"training.init_from={given} is of the training in {recipe.path('train')}, whose place the new one takes; "
            "copy the file elsewhere, or choose another --exp-dir"
        )


def run_train(recipe: Recipe) -> None:
    """Trains; goes on from the newest checkpoint of the folder if there is one."""
    from asr.data.features import FeatureStats
    from asr.data.tokenizer import Tokenizer
    from asr.training.train_data import load_train_data
    from asr.training.trainer import train

    out = recipe.path("train")
    try:
        with stopped_by_sigterm():
            if recipe.num_processes > 1 or recipe.nodes.count > 1:
                train_on_processes(recipe)
                return
            data = load_train_data(
                recipe.experiment,
                recipe.path("data/features/cuts_train.jsonl.gz"),
                recipe.path("data/features/cuts_valid.jsonl.gz"),
                Tokenizer.load(recipe.path("tokenizer/tokenizer.json")),
                FeatureStats.load(recipe.path("data/features/stats.json")),
                out,
            )
            result = train(recipe.experiment, data, out, resume="auto", device=recipe.device, command=recipe.command)
    except Terminated:
        raise StageStopped("SIGTERM with nothing left to save") from None
    if result.reason == "terminated":
        raise StageStopped(f"SIGTERM at step {result.step}, saved in {result.checkpoint}")


def run_average(recipe: Recipe) -> None:
    """Chooses the weights that decode, on validation cuts."""
    from asr.training.averaging import average

    if recipe.num_processes > 1:
        average_on_processes(recipe)
        return
    cuts = recipe.cuts("valid", features=True)
    average(recipe.path("train"), cuts, recipe.experiment.average, device=recipe.device)


def _exported(recipe: Recipe) -> Loaded:
    """The averaged model with the recipe's settings of the export."""
    from asr.decoding.load import load_for_decoding

    loaded = load_for_decoding(recipe.path("train/average.pt"), "cpu")
    return dataclasses.replace(loaded, config=dataclasses.replace(loaded.config, export=recipe.experiment.export))


def run_export(recipe: Recipe) -> None:
    """Writes files for devices, a folder for each target and chunk; int8 is chosen on validation cuts."""
    from asr.export.export import check_target, export
    from asr.export.spec import read_spec

    config = recipe.experiment.export
    if not config.targets:
        print(f"  nothing: choose with --set 'export.targets=[{', '.join(TARGETS)}]'", flush=True)
        return
    loaded, development = _exported(recipe), recipe.cuts("valid", features=False)
    wanted = {
        name: (target, read_spec(config, str(chunk), development=development))
        for name, (target, chunk) in config.folders.items()
    }
    for target, spec in wanted.values():  # all that can be refused, before the first is written
        check_target(target, loaded, spec)
    for name, (target, spec) in wanted.items():
        folder = recipe.path(f"export/{name}")
        manifest = export(loaded, recipe.path("train/average.pt"), target, folder, spec)
        for precision, files in manifest.files.items():
            size = sum((folder / file).stat().st_size for file in files.values())
            print(f"  {name}, {precision}: {size / 1e6:.2f} MB", flush=True)


def run_verify(recipe: Recipe) -> None:
    """Runs the exported files in their runtimes on the recordings of the first test set; they must hear what the model
    hears."""
    from asr.export.report import write_report
    from asr.export.verify import verify

    config = recipe.experiment.export
    if not config.targets:
        print("  nothing was exported", flush=True)
        return
    loaded, cuts = _exported(recipe), recipe.cuts(recipe.options.tests[0], features=False)
    failed = []
    for name in config.folders:
        folder, checkpoint = recipe.path(f"export/{name}"), recipe.path("train/average.pt")
        report = verify(loaded, checkpoint, folder, cuts, max_wer_increase=config.max_wer_increase)
        write_report(report, recipe.path(f"verify/{name}"))
        for one in report.precisions:
            verdict = "as PyTorch" if one.ok else f"FAILS: {one.reason}"
            print(
                f"  {name}, {one.precision}: {one.errors}, {one.step_ms_median:.1f} ms a chunk, {verdict}", flush=True
            )
            failed += [] if one.ok else [f"{name}, {one.precision}: {one.reason}"]
    if failed:
        raise UserError(f"exported files do not hear what the model hears: {'; '.join(failed)}; see EXP/verify")


def print_result(recipe: Recipe) -> None:
    """Where the results are; the last line is the result, see ``print_decoded``."""
    for name in recipe.experiment.export.folders:
        if (proof := recipe.path(f"verify/{name}/verify.html")).is_file():
            print(f"export: {recipe.path(f'export/{name}')}, proof: {proof}")
    print(f"training: {recipe.path('train/report.html')}")
    if (page := recipe.path(PAGE)).is_file():
        print(f"report: {page}")
    print(f"checkpoint: {recipe.path('train/average.pt')}")
    print_decoded(recipe)


def stages(experiment: Experiment, options: CorpusOptions, chunks: Sequence[Milliseconds]) -> list[Stage]:
    """The stages in their order, with what each reads, writes, and depends on."""
    cuts = tuple(f"data/cuts_{split}.jsonl.gz" for split in options.splits)
    manifests = tuple(f"data/features/cuts_{split}.jsonl.gz" for split in options.splits)
    features = (*manifests, "data/features/stats.json")
    data = experiment.data
    stored, sharded = data.features.storage == "stored", data.features.storage == "shar"
    # shards may be moved to where data.shar.urls says
    in_files = options.splits if stored else ("train",) if sharded and not data.shar.urls else ()
    feature_files = tuple(f"data/features/{split}" for split in in_files)
    trained = ("train/checkpoints", "train/best.pt", "train/metrics.jsonl", "train/config.yaml")
    decoded = tuple(decoded_files(experiment, options, chunks))
    scores = tuple(score_files(experiment, options, chunks))
    exports = experiment.export.folders
    proofs = tuple(f"verify/{name}/verify.{kind}" for name in exports for kind in ("json", "html"))
    checks = ("experiment.data.strict", "experiment.data.max_bad_fraction")
    tokens = ("tokenizer/tokenizer.json",)
    unused = ("shar.urls", "shar.cache", "shar.cache_gb") if sharded else ("shar", "features.shard_cuts")
    training = ("seed", "data", "model", "loss", "optim", "training")
    return [
        Stage(
            "download", run_download, (), (CORPUS_FILE,), ("corpus.name", "corpus.archives"), ("corpus.dir", "sounds")
        ),
        Stage(
            "prepare",
            run_prepare,
            (CORPUS_FILE,),
            (*cuts, "data/audio", "data/bad_rows.txt", CHECKSUMS_FILE),
            ("corpus.options", "data_seed"),
            (*checks, "corpus.files"),
            audio_s=partial(audio_of_stage, "prepare"),
        ),
        Stage(
            "features",
            run_features,
            (*cuts, "data/audio", CHECKSUMS_FILE),
            (*features, *feature_files),
            (
                "experiment.data.features",
                "!experiment.data.features.num_jobs",
                *(() if sharded else ("!experiment.data.features.shard_cuts", "experiment.data.augment")),
                "data_seed",
            ),
            checks,
            audio_s=partial(audio_of_stage, "features"),
        ),
        Stage(
            "tokenizer",
            run_tokenizer,
            cuts,
            (*tokens, "tokenizer/tokens.txt"),
            ("experiment.tokenizer",),
            audio_s=partial(audio_of_stage, "tokenizer"),
        ),
        Stage(
            "train",
            run_train,
            (*features, *feature_files, *tokens),
            trained,
            # what changes speed but not results, and what only decides whether bad rows stop the run, is left out
            (
                *(f"experiment.{name}" for name in training),
                *(["more_cuts"] if experiment.data.more_cuts else []),
                "!experiment.data.num_workers",
                "!experiment.data.features.num_jobs",
                *(f"!experiment.data.{name}" for name in unused),
                *(f"!{name}" for name in checks),
            ),
            checks,
            resume_dir="train",
            results_dir="decode",
            checkpoints="checkpoints",
            check=check_beginning,
        ),
        Stage(
            "average",
            run_average,
            (*trained, manifests[1]),
            ("train/average.pt",),
            ("experiment.average",),
            audio_s=partial(audio_of_stage, "average"),
        ),
        Stage(
            "decode",
            run_decode,
            ("train/average.pt", *manifests[2:]),
            decoded,
            ("experiment.decoding", "!experiment.decoding.chunk_ms", "decode_chunks"),
            audio_s=partial(audio_of_stage, "decode"),
        ),
        Stage("score", run_score, decoded, scores, ("experiment.scoring",)),
        Stage(
            "export",
            run_export,
            ("train/average.pt", cuts[1]),
            tuple(f"export/{name}" for name in exports),
            ("experiment.export",),
        ),
        Stage(
            "verify",
            run_verify,
            ("train/average.pt", cuts[2], *(f"export/{name}" for name in exports)),
            proofs,
            ("experiment.export",),
        ),
        Stage("report", run_report, (*cuts, *tokens, "train/metrics.jsonl", *scores, *proofs), (PAGE, TEXT), ()),
    ]


def make_recipe(name: str, args: argparse.Namespace, command: str, config: Path | None) -> tuple[Recipe, Pipeline]:
    """The recipe and its stages from parsed options.

    Raises:
        UserError: a setting, an option of the corpus or a device that does not exist or has a wrong value; an
            experiment folder of another recipe; ``--dask`` without its package or without work.
    """
    corpus = CORPORA[name]
    prefix = "corpus_"
    fields = {entry.name for entry in dataclasses.fields(corpus.Options)}
    options = corpus.Options(**{field: getattr(args, prefix + field) for field in fields})
    overrides = [*(["training.errors_in=characters"] if options.scores_characters else []), *args.set]
    if args.seed is not None:
        overrides.append(f"seed={args.seed}")
    if args.init_from is not None:
        overrides.append(f"training.init_from={begin_file(Path(args.init_from).absolute())}")
    if args.strict:
        overrides.append("data.strict=true")
    sounds = chosen_sounds({key: getattr(args, f"with_{key}") for key in SOUNDS}, args.download_dir)
    overrides += [chosen.setting for chosen in sounds]
    experiment = load_experiment([*([config] if config else []), *args.config], overrides)
    if args.dask is not None:
        check_dask(args.dask)
        if experiment.data.features.storage != "stored":
            raise UserError(
                f"--dask computes stored features, and data.features.storage={experiment.data.features.storage} leaves "
                "them to training; leave --dask out, or pass --set data.features.storage=stored"
            )
    chunks = chosen_chunks(args.decode_chunks, experiment, options)
    nodes = Nodes(args.nodes, args.node_rank, args.master)
    experiment.parallel.check(args.nproc * nodes.count, experiment.memory.offload)
    device = resolve_device(args.device)
    check_processes(args.nproc, device)
    owner = _owner(args.exp_dir)
    if owner not in (None, name) and not args.force:
        raise UserError(
            f"{args.exp_dir} belongs to the recipe {owner}, not to {name}; choose another --exp-dir, or pass --force "
            "to replace what is there"
        )
    corpus_dir = args.corpus_dir or (_remembered(args.exp_dir) if owner in (None, name) else None)
    recipe = Recipe(
        corpus=corpus,
        options=options,
        exp_dir=args.exp_dir,
        download_dir=args.download_dir,
        corpus_dir=corpus_dir,
        experiment=experiment,
        data_seed=args.data_seed,
        device=device,
        num_jobs=args.num_jobs,
        command=command,
        dask=args.dask,
        num_processes=args.nproc,
        nodes=nodes,
        chunks=chunks,
        sounds=tuple(sounds),
    )
    settings = {
        "experiment": to_dict(experiment),
        "corpus": {
            "name": name,
            "options": dataclasses.asdict(options),
            "archives": list(options.archives),
            "dir": str(corpus_dir.absolute()) if corpus_dir else None,
            "files": files_of(corpus_dir, options.archives, args.exp_dir) if corpus_dir else None,
        },
        "data_seed": args.data_seed,
        "decode_chunks": chunks,
        "more_cuts": {path: state_of(Path(path)) for path in experiment.data.more_cuts},
        "sounds": {key: getattr(args, f"with_{key}") for key in SOUNDS},
    }
    return recipe, Pipeline(stages(experiment, options, chunks), args.exp_dir, settings, command)


def _owner(exp_dir: Path) -> str | None:
    """The recipe whose download stage finished last in this folder."""
    try:
        marker = json.loads((exp_dir / DONE_DIR / "download.json").read_text(encoding="utf-8"))
        return str(marker["settings"]["corpus.name"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _remembered(exp_dir: Path) -> Path | None:
    """The --corpus-dir of an earlier run in this folder, so that it need not be repeated for every stage."""
    try:
        note = json.loads((exp_dir / CORPUS_FILE).read_text(encoding="utf-8"))
        return Path(note["corpus_dir"]) if note["given"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
