from __future__ import annotations

import io
import itertools
import json

import numpy as np
import pytest
import torch

from asr.decoding.emission import EmissionPosteriors, emission_figure, emission_posteriors, emissions_to_dict
from tests.asr.decoding.fake import TableTransducer, TinyTransducer


class FrameNumbers(TableTransducer):
    """The table's frame t is feature frame t."""

    def encode(
        self, features: torch.Tensor, feature_lens: torch.Tensor, *context: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.arange(features.shape[1], dtype=torch.float64)[None, :, None], feature_lens


def random_table(frames: int, tokens: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(frames, tokens + 1, tokens + 1, generator=generator, dtype=torch.float64).softmax(-1)


CASES = [("regular", 4, 2), ("regular", 3, 4), ("regular", 5, 1), ("regular", 1, 2), ("regular", 3, 0)]
CASES += [("modified", 4, 2), ("modified", 3, 3), ("modified", 5, 1), ("modified", 3, 0)]


@pytest.mark.parametrize(("topology", "frames", "tokens"), CASES)
def test_equals_enumeration_of_all_alignments(topology, frames, tokens):
    """Tokens are emitted at frames f_1 <= f_2 <= ...; every frame ends with a blank.

    "modified": at frames f_1 < f_2 < ..., and only frames without a token have a blank.
    """
    modified = topology == "modified"
    table = random_table(frames, tokens, seed=frames)
    targets = list(range(1, tokens + 1))
    found = emission_posteriors(FrameNumbers(table), torch.zeros(frames, 1), targets, topology=topology)
    label = np.zeros((frames, tokens))
    blank, due, total = np.zeros(frames), np.zeros(frames), 0.0
    p = table.numpy()
    choose = itertools.combinations if modified else itertools.combinations_with_replacement
    for at in choose(range(frames), tokens):
        weight = np.prod([p[t, u, targets[u]] for u, t in enumerate(at)])
        weight *= np.prod([p[t, sum(f <= t for f in at), 0] for t in range(frames) if not (modified and t in at)])
        total += weight
        for u, t in enumerate(at):
            label[t, u] += weight
        for t in range(frames):
            before = sum(f < t for f in at)
            blank[t] += weight * p[t, before, 0]
            due[t] += weight * p[t, before, targets[before]] if before < tokens else 0.0
    np.testing.assert_allclose(found.label_posterior, label / total, atol=1e-12)
    np.testing.assert_allclose(found.blank, blank / total, atol=1e-12)
    np.testing.assert_allclose(found.next_label, due / total, atol=1e-12)


def test_blocks_of_frames_do_not_matter(monkeypatch):
    table = random_table(7, 3, seed=0)
    whole = emission_posteriors(FrameNumbers(table), torch.zeros(7, 1), [1, 2, 3])
    monkeypatch.setattr("asr.decoding.emission._BLOCK_LOGITS", 40)
    parts = emission_posteriors(FrameNumbers(table), torch.zeros(7, 1), [1, 2, 3])
    np.testing.assert_array_equal(whole.label_posterior, parts.label_posterior)


def test_a_spread_emission_shows():
    table = torch.full((5, 2, 3), 0.0005, dtype=torch.float64)
    table[:, :, 0] = 0.999
    table[1:4, 0] = torch.tensor([0.6, 0.37, 0.03])
    found = emission_posteriors(FrameNumbers(table), torch.zeros(5, 1), [1], symbols=["<blk>", "no", "yes"])
    assert found.symbols == ["no"]
    assert found.next_label.max() == pytest.approx(0.37, abs=1e-3)
    assert found.blank[1] == pytest.approx(0.6, abs=1e-3)
    assert found.confidence[0] < 0.6  # 0.37 of 0.37 + 0.22 + 0.13
    np.testing.assert_allclose(found.label_posterior.sum(0), 1.0)


def test_any_predictor_and_too_short_audio():
    model = TinyTransducer()
    found = emission_posteriors(model, torch.randn(43, 80, generator=torch.Generator().manual_seed(0)), [1, 4, 4])
    assert found.label_posterior.shape == (10, 3)
    np.testing.assert_allclose(found.label_posterior.sum(0), 1.0)
    with pytest.raises(ValueError, match="2 feature frames"):
        emission_posteriors(model, torch.zeros(2, 80), [1])


def example(tokens: int = 2) -> EmissionPosteriors:
    table = random_table(6, tokens, seed=1)
    model, targets = FrameNumbers(table), list(range(1, tokens + 1))
    symbols = ["<blk>", "$a$", "▁ж", "c"]
    return emission_posteriors(model, torch.zeros(6, 1), targets, cut_id="utt_$1", text="$a$ ж", symbols=symbols)


@pytest.mark.parametrize("tokens", [0, 2])
def test_figure_draws_without_pyplot(tokens):
    import matplotlib.pyplot

    figure = emission_figure(example(tokens))
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=50)
    assert picture.getvalue().startswith(b"\x89PNG")
    assert len(figure.axes) == 2
    assert len(figure.axes[1].get_lines()) == tokens
    assert matplotlib.pyplot.get_fignums() == []


def test_json_form():
    one = example()
    described = json.loads(json.dumps(emissions_to_dict([one])))["utterances"][0]
    assert described["frame_shift_s"] == 0.04
    assert [entry["symbol"] for entry in described["series"]] == ["<blk>", "$a$", "▁ж"]
    assert described["series"][1]["posterior"] == pytest.approx(one.label_posterior[:, 0], abs=1e-4)
