"""The configuration tree: defaults, presets, files, overrides, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
import re
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml

from asr.config import Experiment, dotted_keys, dump, from_dict, keys_help, load_experiment, parse_override, to_dict
from asr.data.loader import DataConfig
from asr.errors import UserError
from asr.models.presets import PRESETS
from asr.models.transducer import ModelConfig
from asr.training.optim import OptimConfig
from asr.training.trainer_config import TrainingConfig


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def get(tree: Any, key: str) -> Any:
    for name in key.split("."):
        tree = tree[name] if isinstance(tree, dict) else getattr(tree, name)
    return tree


def test_defaults_are_those_of_the_dataclasses() -> None:
    experiment = load_experiment()
    assert (experiment.name, experiment.seed) == ("experiment", 0)
    assert experiment.data == DataConfig()
    assert experiment.optim == OptimConfig()
    assert experiment.training == TrainingConfig()
    assert experiment.model.preset == ModelConfig().preset


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_sets_what_it_names(preset: str) -> None:
    model = to_dict(load_experiment(None, [f"model.preset={preset}"]))["model"]
    for part, values in PRESETS[preset].items():
        assert {name: model[part][name] for name in values} == values
    assert model["encoder"]["dropout"] == 0.1, "what the preset does not name keeps its default"


@pytest.mark.parametrize("order", [1, -1])
def test_explicit_values_win_over_the_preset_in_any_order(order: int, tmp_path: Path) -> None:
    overrides = ["model.encoder.num_layers=7", "model.preset=xs", "model.joiner.dim=24"][::order]
    path = write(tmp_path / "a.yaml", "model: {preset: l, encoder: {ff_dim: 11}}")
    encoder, joiner = (get(load_experiment(path, overrides).model, part) for part in ("encoder", "joiner"))
    assert (encoder.num_layers, encoder.dim, encoder.ff_dim, joiner.dim) == (7, 64, 11, 24)


def test_loading_leaves_the_presets_alone() -> None:
    before = copy.deepcopy(PRESETS)
    load_experiment(None, ["model.encoder.num_layers=7", "model.ctc=true", "model.predictor.kind=lstm"])
    experiment = load_experiment()
    experiment.model.encoder.num_layers = 99
    assert PRESETS == before
    assert load_experiment().model.encoder.num_layers == PRESETS["s"]["encoder"]["num_layers"]


def test_later_files_win_and_overrides_win_over_files(tmp_path: Path) -> None:
    first = write(tmp_path / "a.yaml", "seed: 1\noptim: {lr: 0.1, warmup_steps: 5}\ntraining: {chunk_ms: [160, 320]}\n")
    second = write(tmp_path / "b.yaml", "optim: {lr: 0.2}\nname: b\ntraining: {chunk_ms: [full]}\n")
    experiment = load_experiment([first, second], ["name=c", "optim.eps=1e-6", "name=d"])
    assert (experiment.seed, experiment.name) == (1, "d")
    assert experiment.optim == OptimConfig(lr=0.2, warmup_steps=5, eps=1e-6)
    assert experiment.training.chunk_ms == ["full"], "lists are replaced, not joined"
    assert load_experiment([second, first]).optim.lr == 0.1


def test_an_empty_file_is_no_difference(tmp_path: Path) -> None:
    assert load_experiment(write(tmp_path / "a.yaml", "# nothing\n")) == load_experiment()


VALUES = [
    ("optim.lr=1e-3", 0.001),
    ("optim.lr=1", 1.0),
    ("training.chunk_ms=[160, full]", [160, "full"]),
    ("decoding.chunk_ms=320", 320),
    ("decoding.chunk_ms=full", "full"),
    ("data.augment.noise_snr_db=[]", []),
    ("data.augment.recorded_noise.path=musan", "musan"),
    ("data.augment.recorded_noise.music_prob=0.2", 0.2),
    ("data.augment.recorded_noise.music_prob=null", None),
    ("model.ctc=true", True),
    ("name='5'", "5"),
    ("name=a=b", "a=b"),
    ("loss.memory_limit=500MB", "500MB"),
    ("loss.memory_limit=null", None),
    ("loss.occupancy_threshold=null", None),
    ("loss.occupancy_threshold=0.001", 0.001),
    ("optim={lr: 0.5, eps: 0.1}", OptimConfig(lr=0.5, eps=0.1)),
]


@pytest.mark.parametrize(("override", "value"), VALUES)
def test_overrides_are_read_as_yaml(override: str, value: Any) -> None:
    found = get(load_experiment(None, [override]), override.split("=")[0])
    assert found == value and type(found) is type(value)


def test_parse_override() -> None:
    assert parse_override("a.b.c=[1, x]") == {"a": {"b": {"c": [1, "x"]}}}


REFUSED = [
    ("optim.lrr=1", "unknown key 'optim.lrr' in override 'optim.lrr=1'; nearest valid: optim.lr"),
    ("lr=1", "unknown key 'lr' .* nearest valid: optim.lr"),
    ("max_epochs=3", "unknown key 'max_epochs' .* nearest valid: training.max_epochs"),
    ("training.lr=1", "unknown key 'training.lr' .* nearest valid: optim.lr"),
    ("dropout=0", "nearest valid: model.encoder.dropout, model.predictor.dropout"),
    ("data.feature.num_mel_bins=1", "unknown key 'data.feature'.* nearest valid: data.features"),
    ("zzzzzz=1", "nearest valid: name, seed, data, tokenizer, model"),
    ("optim.lr.x=1", "optim.lr"),
    ("=1", "not of the form key.name=value"),
    ("optim.lr", "not of the form key.name=value"),
    ("optim..lr=1", "unknown key 'optim.'"),
    ("optim=3", "optim in override 'optim=3' is a group of settings, not the value 3; set optim.NAME"),
    ("model=null", "model .* is a group of settings"),
    ("optim.lr=", "optim.lr .* has no value"),
    ("parallel.zero=4", "parallel.zero: 4 is not one of 0, 1, 2, 3$"),
    ("training.precision=float16", "training.precision: float16 is not one of auto, fp32, bf16, fp16$"),
    ("training.precision_overrides={joiner: half}", "half is not one of fp32, bf16, fp16$"),
    ("memory.limit=4", "memory.limit: 4 is not text .* or null$"),
    ("average.last=[a]", "average.last: a is not a whole number$"),
    ("name=null", "name .* has no value"),
    ("optim.lr=fast", "optim.lr: fast is not a number$"),
    ("data.augment.concat_prob=0.5", "concat_prob=0.5 needs features.storage=on_the_fly"),
    ("data.augment.recorded_noise.noise_prob=2", "noise_prob=2.* lies in"),
    ("data.augment.recorded_noise.dir=a", "data.augment.recorded_noise.dir"),
    ("optim.lr=true", "optim.lr"),
    ("seed=1.5", "seed: 1.5 is not a whole number$"),
    ("seed=[1]", "seed"),
    ("model.ctc=3", "model.ctc: 3 is not true or false$"),
    ("training.chunk_ms=320", "training.chunk_ms.*list"),
    ("training.chunk_ms=[a]", "training.chunk_ms: a is not"),
    ("optim.schedule=linear", "optim.schedule: linear is not one of cosine, noam, eden, constant$"),
    ("decoding.search=beem", "decoding.search: beem is not one of greedy, modified_beam_search$"),
    ("model.preset=huge", "model.preset='huge' .* valid: xs, s, m, l, xl, xxl"),
    ("model.preset=[xs]", r"model.preset=\['xs'\]"),
    ("loss.method=exact", "loss.method='exact' is unknown; valid: .*batched"),
    ("loss.ctc_weight=0.3", "loss.ctc_weight=0.3 needs a CTC head; set model.ctc=true"),
    ("loss.ctc_weight=-1", "loss.ctc_weight=-1.0 must be at least 0"),
    ("loss={method: pruned, clamp: 1}", "loss.clamp=1.0 is not defined for method 'pruned'"),
    ("loss={method: pruned, fastemit_lambda: 0.1}", "loss.fastemit_lambda=0.1 is not defined for method 'pruned'"),
    ("loss={topology: constrained, fastemit_lambda: 0.1}", "loss.fastemit_lambda=0.1 .* topology 'constrained'"),
    ("loss.prune_range=1", "loss.prune_range=1 is below 2"),
    ("loss.occupancy_threshold=1", "loss.occupancy_threshold=1.0 is not from 0 to 1"),
    ("loss={lm_only_scale: 0.75, am_only_scale: 0.5}", "loss.lm_only_scale=0.75 and am_only_scale=0.5 sum to more"),
    ("loss.clamp=-1", "loss.clamp=-1.0 is not a number from 0 up"),
    ("loss.alignment_power=0", "loss.alignment_power=0.0"),
    ("loss.simple_warmup=1.5", "loss.simple_warmup=1.5 is not from 0 to 1"),
    ("loss.simple_loss_scale=-0.5", "loss.simple_loss_scale=-0.5 is not from 0 to 1"),
    ("loss.shaping_from=2", "loss.shaping_from=2.0 is not from 0 to 1"),
    ("loss.memory_limit=[1]", "loss.memory_limit"),
    ("loss.memory_limit=2 GoB", "loss.memory_limit='2 GoB' is not a size"),
    ("optim.lr=-1", "optim.lr=-1.0 must be above 0"),
    ("optim.lr=.nan", "optim.lr=nan"),
    ("training.max_epochs=0", "training.max_epochs=0 must be at least 1"),
    ("training.ema_decay=1", "training.ema_decay=1.0 is outside"),
    ("training.chunk_ms=[]", "training.chunk_ms"),
    ("training.chunk_ms=[100]", "training.chunk_ms=100 must be a multiple of 40 ms"),
    ("training.left_context_ms=[-40]", "training.left_context_ms=-40 must be"),
    ("decoding.chunk_ms=0", "decoding.chunk_ms=0 must be"),
    ("decoding.left_context_ms=30", "decoding.left_context_ms=30 must be"),
    ("parallel.tensor=2", "parallel.tensor=2 does not exist yet; .* parallel.zero=3"),
    ("parallel.pipeline=4", "parallel.pipeline=4 does not exist yet"),
    ("parallel.time=2", "parallel.time=2 does not exist yet"),
    ("parallel={zero: 1, replicas: 2}", "parallel.replicas=2 needs .* parallel.zero=2 or 3"),
    ("parallel.replicas=0", "parallel.replicas=0 must be at least 1"),
    ("parallel.timeout_s=0", "parallel.timeout_s=0.* must be above 0"),
    ("average.last=[3, 0]", r"average.last=\[3, 0\] must hold numbers of at least 1"),
    ("model.predictor.dropout=1", r"model.predictor.dropout=1.0 is outside \[0, 1\)"),
    ("model.encoder.dropout=1", r"model.encoder.dropout=1.0 is outside \[0, 1\)"),
    ("model.encoder.num_heads=5", "model.encoder.num_heads=5"),
    ("data.max_duration_s=0", "max_duration_s=0"),
    ("name=[", "not valid YAML"),
]


@pytest.mark.parametrize(("override", "message"), REFUSED)
def test_refused_in_one_line(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_experiment(None, [override])
    assert "\n" not in str(caught.value)


FILES = [
    ("optim: [1", "a.yaml is not valid YAML"),
    ("\tseed: 1", "a.yaml is not valid YAML"),
    ("- 1", "a.yaml holds list, expected settings"),
    ("just text", "a.yaml holds str"),
    ("optim:\n", "optim in .*a.yaml is a group of settings, not the value None"),
    ("optim: {lr: }", "optim.lr in .*a.yaml has no value"),
    ("optim: {lrr: 1}", "unknown key 'optim.lrr' in .*a.yaml; nearest valid: optim.lr"),
    ("1: 2", "unknown key '1'"),
    # the parser would take it, but after the preset was chosen
    ("model.preset: xs", r"model.preset in .*a.yaml is written with a dot; in files write model: {preset: ...}"),
    ("model: {encoder.dim: 8}", r"model.encoder.dim .* write model: {encoder: {dim: ...}}"),
]


@pytest.mark.parametrize(("text", "message"), FILES)
def test_a_file_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path / "a.yaml", text)
    with pytest.raises(UserError, match=message) as caught:
        load_experiment(path)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none.yaml does not exist"):
        load_experiment(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="cannot be read"):
        load_experiment(tmp_path)
    (tmp_path / "a.yaml").write_bytes(b"name: \xff\n")
    with pytest.raises(UserError, match="a.yaml cannot be read"):
        load_experiment(tmp_path / "a.yaml")


CHANGED = [
    "scoring={case: lower, remove_words: [uh, um]}",
    "name=ünïcode: 'quoted' # no comment",
    "seed=12345678901",
    "tokenizer={kind: char, vocab_size: 77}",
    "data.features={storage: on_the_fly, num_mel_bins: 40, tail_chunk_ms: 640}",
    "data.augment={speed_factors: [0.95, 1], noise_snr_db: [], copies: 3}",
    "data.spec_augment.prob=0.25",
    "data.strict=true",
    "model={preset: m, ctc: true, num_mel_bins: 40}",
    "model.encoder={dropout: 0.0, conv_kernel: 9}",
    "model.predictor.kind=lstm",
    "model.joiner.activation=relu",
    "loss={ctc_weight: 0.3, method: pruned, prune_range: 4, simple_warmup: 0.25, memory_limit: 2GB}",
    "optim={lr: 0.000123456789, betas: [0.5, 0.75], schedule: noam, eps: 1e-12}",
    "training={accumulation: 2, normalize: utterances, precision: bf16, chunk_ms: [full, 320], tensorboard: false}",
    "training.precision_overrides={joiner: fp32}",
    "parallel={zero: 3, replicas: 2, timeout_s: 60, gather: bf16, hang_timeout_s: 30}",
    "memory={checkpointing: budget, activation_budget: 0.25, lower_after: 2, limit: 8GiB, offload: file}",
    "average={last: [], ema: false}",
    "decoding={max_symbols_per_frame: 3, chunk_ms: 320, left_context_ms: full}",
    "export={targets: [onnx], precisions: [int8], chunk_ms: [640, full], left_context_ms: 2560, max_wer_increase: 1}",
]


def test_a_dump_gives_the_same_experiment(tmp_path: Path) -> None:
    overrides = [
        text.replace("name=ünïcode: 'quoted' # no comment", "name=\"ünïcode: 'quoted' # no\"") for text in CHANGED
    ]
    experiment = load_experiment(None, overrides)
    default = to_dict(load_experiment())
    changed = to_dict(experiment)
    assert all(changed[name] != default[name] for name in default), "a part of the tree has no changed value"
    assert load_experiment(write(tmp_path / "a.yaml", dump(experiment))) == experiment
    assert from_dict(changed) == experiment
    assert dump(load_experiment(tmp_path / "a.yaml")) == dump(experiment)
    assert list(yaml.safe_load(dump(experiment))) == [entry.name for entry in dataclasses.fields(Experiment)]


def test_help_explains_every_key() -> None:
    branches = {key for key in dotted_keys() if any(other.startswith(key + ".") for other in dotted_keys())}
    leaves = [key for key in dotted_keys() if key not in branches]
    assert len(leaves) > 60 and "model.encoder.dropout" in leaves
    text = keys_help()
    entries = {m[1]: m[2] for m in re.finditer(r"^ +--([a-z0-9_.]+)[ \n](.*?)(?=^ +--|\Z)", text, re.M | re.S)}
    assert set(leaves) == entries.keys()
    assert set(re.findall(r"(?<!\w)--?([a-z]\S*)", text.partition("\n\n")[2])) == set(leaves), "not for an override"
    for key in leaves:
        # "METAVAR  what it means (type: ..., default: ...)"
        about = re.sub(r"\((type:|required|default:|see).*", "", entries[key], flags=re.S).split()[1:]
        assert len(" ".join(about)) >= 5, f"{key}: {entries[key]!r}"
        assert "default:" in entries[key], key


def test_every_field_is_documented_beside_it() -> None:
    def visit(cls: type) -> None:
        documented = set(re.findall(r"^ {8}(\w[\w, ]*):", cls.__doc__ or "", re.M))
        names = {name for group in documented for name in group.split(", ")}
        for entry in dataclasses.fields(cls):
            assert entry.name in names, f"{cls.__name__}.{entry.name}"
            kind = typing.get_type_hints(cls)[entry.name]
            if dataclasses.is_dataclass(kind):
                visit(kind)

    visit(Experiment)


def test_only_the_settings_that_are_wrong_are_named() -> None:
    right = ["model.ctc=true", "seed=3"]
    for wrong in ("optim.lr=abc", "data.max_duration_s=0"):
        with pytest.raises(UserError, match=f"^{wrong}: ") as caught:
            load_experiment(overrides=[*right, wrong])
        assert "ctc" not in str(caught.value) and "seed" not in str(caught.value)
