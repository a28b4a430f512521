"""One page that shows cuts as training hears them, with pictures and sound in the file itself: it opens offline."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import soundfile
from matplotlib.image import imsave

from asr.data.audio import SAMPLE_RATE_HZ
from asr.data.fbank import FRAME_SHIFT_MS
from asr.data.show import ShownCut
from asr.data.tokenizer import SPACE
from asr.training.report import fill_template
from asr.training.report_sections import text, tile

_STYLE = """<style>
.strip { position: relative; margin: 2px 0 10px; } .strip img { display: block; height: 150px; border-radius: 6px; }
.cut { padding: 13px 17px 15px; margin-bottom: 16px; } .cut h3 { overflow-wrap: anywhere; margin-bottom: 6px; }
.cut audio { width: 100%; height: 36px; margin-bottom: 6px; } .cut .said { font-size: 17px; overflow-wrap: anywhere; }
.tokens { display: flex; flex-wrap: wrap; gap: 4px; margin: 6px 0; }
.tokens code { background: var(--code); border-radius: 5px; padding: 0 5px; white-space: pre; }
</style>"""


@dataclass(frozen=True)
class DataPage:
    """What the page is about.

    Args:
        source: the manifest.
        cuts: those that are shown.
        total: how many there are in the manifest.
        seed, epoch: of the training.
        stored: whether the features are those that were stored.
    """

    source: str
    cuts: Sequence[ShownCut]
    total: int
    seed: int
    epoch: int
    stored: bool


def data_page(page: DataPage) -> str:
    """The page, HTML."""
    source = "stored features" if page.stored else "features computed from the sound"
    lead = f"{len(page.cuts)} of {page.total:,} cuts of {page.source}; seed {page.seed}, epoch {page.epoch}; {source}"
    header = (
        '<header><div><div class="eyebrow">Training data</div><div class="headline"><h1>What training hears</h1>'
        '<button id="theme" type="button">Light / dark</button></div>'
        f'<p class="lead">{text(lead)}</p><nav></nav></div></header>'
    )
    shown = "".join(f'<div class="card cut" id="cut{i}">{_cut(one)}</div>' for i, one in enumerate(page.cuts))
    sections = f'<h2 id="table">All of them</h2>{_table(page.cuts)}<h2 id="cuts">One by one</h2>{shown}'
    body = f"{_STYLE}{header}<main>{_tiles(page.cuts, page.stored)}{sections}<footer></footer></main>"
    return fill_template("Training data", body, plays=True)


def _tiles(cuts: Sequence[ShownCut], stored: bool) -> str:
    durations = [one.duration_s for one in cuts]
    rates = [_rate(one) for one in cuts if one.tokens]
    noisy = sum("noise" in one.drawn for one in cuts)
    masked = sum("masked_frames" in one.drawn or "masked_bins" in one.drawn for one in cuts)
    out = [
        tile("Duration", f"{np.mean(durations):.2f} s", f"mean; {min(durations):.2f} to {max(durations):.2f} s"),
        tile("Tokens a frame, U / T", f"{np.mean(rates):.2f}" if rates else "–", _most(rates)),
        *([] if stored else [tile("Noise", f"{noisy} of {len(cuts)}", "cuts with noise added")]),
        tile("SpecAugment", f"{masked} of {len(cuts)}", "cuts with masks"),
    ]
    return f'<div class="tiles">{"".join(out)}</div>'


def _most(rates: Sequence[float]) -> str:
    return f"mean; {max(rates):.2f} at most, above 1 a cut cannot be trained on" if rates else "no text can be spelt"


def _rate(one: ShownCut) -> float:
    return len(one.tokens) / max(one.encoder_frames, 1)


def _table(cuts: Sequence[ShownCut]) -> str:
    names = ("Duration, s", "T", "U", "U / T", "Speed", "Gain, dB", "Noise", "Masked frames", "Masked bins")
    rows = []
    for i, one in enumerate(cuts):
        noise = f"{one.drawn['noise']}, {one.drawn['snr_db']:.1f} dB" if "noise" in one.drawn else "–"
        gain = f"{one.drawn['gain_db']:+.1f}" if "gain_db" in one.drawn else "–"
        cells = [f"{one.duration_s:.2f}", one.encoder_frames, len(one.tokens), f"{_rate(one):.2f}", f"{one.speed:g}"]
        cells += [gain, noise, _covered(one, "masked_frames"), _covered(one, "masked_bins")]
        numbers = "".join(f"<td>{text(cell)}</td>" for cell in cells)
        named = f'<td class="t"><a href="#cut{i}">{i + 1}</a></td><td class="t ids">{text(one.cut_id)}</td>'
        rows.append(f"<tr>{named}{numbers}</tr>")
    head = "".join(f"<th>{name}</th>" for name in names)
    return (
        f'<div class="card scroll"><table><thead><tr><th></th><th class="t">Cut</th>{head}</tr></thead>'
        f'<tbody>{"".join(rows)}</tbody></table></div><p class="note">T: encoder frames of 40 ms with the silent tail; '
        "U: tokens. Training leaves out cuts with more tokens than frames.</p>"
    )


def _covered(one: ShownCut, name: str) -> str:
    if name not in one.drawn:
        return "–"
    held = {i for start, width in one.drawn[name] for i in range(start, start + width)}
    return str(len(held))


def _cut(one: ShownCut) -> str:
    widest = max(len(one.after), len(one.before) if one.before is not None else 0)
    reference = one.after if one.before is None else one.before
    low, high = (float(value) for value in np.percentile(reference, (2, 99.5)))
    number = f"{one.duration_s:.2f} s · T {one.encoder_frames} · U {len(one.tokens)} · U / T {_rate(one):.2f}"
    tokens = "".join(f"<code>{text(token.replace(SPACE, '␣'))}</code>" for token in one.tokens)
    parts = [f'<h3>{text(one.cut_id)}</h3><p class="said">{text(one.text)}</p><div class="tokens">{tokens}</div>']
    parts.append(f'<p class="note">{number}</p>')
    if one.problem:
        parts.append(f'<p><span class="pill bad">{text(one.problem)}</span></p>')
    parts.append('<p class="note">Before: the recording</p>')
    if one.before is not None and one.samples_before is not None:
        parts += [_spectrogram(one.before, widest, low, high, "before"), _player(one.samples_before)]
    parts.append(f'<p class="note">After: {text(", ".join(_draws(one)))}</p>')
    parts.append(_spectrogram(one.after, widest, low, high, "after"))
    if one.samples_after is None:
        said = "The sound of it is not available: level and noise were drawn when features were stored, without it."
        parts.append(f'<p class="note">{said}</p>')
    else:
        parts.append(_player(one.samples_after))
    return "".join(parts)


def _draws(one: ShownCut) -> list[str]:
    """What was drawn, in words."""
    said = [f"speed {one.speed:g}"]
    if one.samples_after is not None:
        said.append(f"{one.drawn['gain_db']:+.1f} dB" if "gain_db" in one.drawn else "level as it is")
        if "reverb" in one.drawn:
            said.append("in a room")
        if "recorded_noise_snr_db" in one.drawn:
            said.append(f"recorded noise at {one.drawn['recorded_noise_snr_db']:.1f} dB SNR")
        noisy = "noise" in one.drawn
        said.append(f"{one.drawn['noise']} noise at {one.drawn['snr_db']:.1f} dB SNR" if noisy else "no noise")
    for name, what in (("masked_bins", "mel bins"), ("masked_frames", "frames")):
        spans = [f"{start}–{start + width - 1}" for start, width in sorted(one.drawn.get(name, []))]
        if spans:
            said.append(f"{what} {', '.join(spans)} masked")
    if "masked_bins" not in one.drawn and "masked_frames" not in one.drawn:
        said.append("no masks")
    return said


def _spectrogram(features: np.ndarray, widest: int, low: float, high: float, name: str) -> str:
    """Log-mel energies, low bins below; all pictures of a cut have one scale of time and of colour."""
    file = io.BytesIO()
    imsave(file, features.T[::-1], vmin=low, vmax=max(high, low + 1e-3), cmap="magma", format="png")
    width = 100 * len(features) / widest
    seconds = f"{len(features) * FRAME_SHIFT_MS / 1000:.2f} s with the silent tail, {features.shape[1]} mel bins"
    return (
        f'<div class="strip"><img alt="{name}" title="{seconds}" style="width:{width:.2f}%" '
        f'src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode("ascii")}"></div>'
    )


def _player(samples: np.ndarray) -> str:
    """A player of 16-bit sound; what is louder than that can be is played softer."""
    peak = float(np.abs(samples).max(initial=0.0))
    note = ""
    if peak > 1:
        samples = samples / np.float32(peak)
        note = f'<p class="note">Played {20 * np.log10(peak):.1f} dB softer than it is.</p>'
    file = io.BytesIO()
    soundfile.write(file, samples, SAMPLE_RATE_HZ, subtype="PCM_16", format="WAV")
    data = base64.b64encode(file.getvalue()).decode("ascii")
    return f'<audio controls preload="none" src="data:audio/wav;base64,{data}"></audio>{note}'
