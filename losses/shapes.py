"""What every tensor of this package looks like, and the one place where wrong ones are refused.

Symbols, everywhere the same:
    B  utterances of the batch         T  encoder frames (padded)      U  target tokens (padded)
    V  vocabulary, blank included      J  joiner dimension
    enc_lens[i] in 1..T and target_lens[i] in 0..U are the true sizes; whatever lies beyond them is never read.

Tensors:
    enc          [B, T, J]        pred         [B, U+1, J]     row u of pred has seen the first u tokens
    weight       [V, J]           bias         [V] or None
    logits       [B, T, U+1, V]   targets      [B, U]          int32 or int64, never blank
    blank_log_probs [B, T, U+1]   log P(blank | t, u)
    label_log_probs [B, T, U]     log P(targets[u] | t, u)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

TOPOLOGIES = ("regular", "modified", "constrained")
REDUCTIONS = ("none", "sum", "mean", "mean-per-token")
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.int32, torch.int64)
# what a tensor of the wrong size is refused with
WANTED = {
    "pred": "[B, U+1, J] as enc [B, T, J] and targets [B, U] have them, one row more than targets",
    "weight": "[V, J] with the J of enc [B, T, J]",
    "bias": "[V], an entry for each row of weight",
    "targets": "[B, U] with a row for each utterance of enc",
    "enc_lens": "[B]",
    "target_lens": "[B]",
    "simple am": "[B, T, V] with B and T of enc and V of weight",
    "simple lm": "[B, U+1, V] with B and V of simple am, one row more than targets",
    "logits": "[B, T, U+1, V], one column more than targets",
    "logit_lengths": "[B]",
    "target_lengths": "[B]",
    "label_log_probs": "[B, T, U] beside blank_log_probs [B, T, U+1]",
}


class Lengths(NamedTuple):
    """True sizes of a checked batch, as plain numbers on the host."""

    enc: list[int]
    target: list[int]

    @property
    def cells(self) -> int:
        """Lattice cells of the batch: sum of T_i * (U_i + 1)."""
        return sum(t * (u + 1) for t, u in zip(self.enc, self.target, strict=True))


def product_dtype(enc: Tensor, pred: Tensor) -> torch.dtype:
    """dtype of the logits: that of autocast where it is on, as for torch's own linear layers."""
    dtype = torch.promote_types(enc.dtype, pred.dtype)
    if dtype != torch.float64 and torch.is_autocast_enabled(enc.device.type):
        return torch.get_autocast_dtype(enc.device.type)
    return dtype


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Refuse a name that is not in the list, and say what is."""
    if value not in choices:
        raise ValueError(f"{name}={value!r} does not exist; choose one of: {', '.join(choices)}")


def _shape(tensor: Tensor) -> str:
    return "[" + ", ".join(map(str, tensor.shape)) + "]"


def _check_tensor(name: str, value: object, shape: str, dims: int, dtypes: Sequence[torch.dtype]) -> Tensor:
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} is a {type(value).__name__}; pass a torch.Tensor of shape {shape}")
    if value.ndim != dims:
        raise ValueError(f"{name} has shape {_shape(value)}; pass {name} of shape {shape}")
    if value.dtype not in dtypes:
        names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise ValueError(f"{name} is {str(value.dtype).removeprefix('torch.')}; pass one of: {names}")
    return value


def _check_size(name: str, tensor: Tensor, dim: int, expected: int, because: str) -> None:
    if tensor.shape[dim] != expected:
        remedy = f"; pass {name} {WANTED[name]}" if name in WANTED else ""
        raise ValueError(f"{name}.shape[{dim}]={tensor.shape[dim]} differs from {because}={expected}{remedy}")


def _check_same_dtype(first: str, other: str, a: Tensor, b: Tensor) -> None:
    """One floating dtype outside of autocast; under autocast the matrix product casts by itself."""
    if a.dtype != b.dtype and not torch.is_autocast_enabled(a.device.type):
        raise ValueError(
            f"{other} is {str(b.dtype).removeprefix('torch.')} but {first} is {str(a.dtype).removeprefix('torch.')}; "
            f"cast {other} with .to({first}.dtype), or call under torch.autocast"
        )


def _check_device(first: str, other: str, a: Tensor, b: Tensor) -> None:
    if a.device != b.device:
        raise ValueError(f"{other} is on {b.device} but {first} is on {a.device}; pass {other}.to({first}.device)")


def _check_lens(name: str, value: object, batch: int, low: int, high: int, source: str, remedy: str) -> list[int]:
    tensor = _check_tensor(name, value, "[B]", 1, INTEGERS)
    _check_size(name, tensor, 0, batch, "the batch size B")
    lens: list[int] = tensor.tolist()
    remedy_below = "leave the utterance out" if low else "pass 0 or more"
    for i, n in enumerate(lens):
        if n > high:
            raise ValueError(f"{name}[{i}]={n} exceeds {source}={high}; {remedy}")
        if n < low:
            raise ValueError(f"{name}[{i}]={n} is below {low}; {remedy_below}")
    return lens


def check_blank(blank: int, vocab_size: int) -> int:
    """Blank as a non-negative id; negative values count from the end as in Python."""
    if isinstance(blank, bool) or not isinstance(blank, int) or not -vocab_size <= blank < vocab_size:
        raise ValueError(f"blank={blank!r} is not a token id; pass an int from {-vocab_size} to {vocab_size - 1}")
    return blank % vocab_size


def check_targets(targets: Tensor, target_lens: list[int], vocab_size: int, blank: int) -> None:
    """Every token within its length is in 0..V-1 and is not blank. Padding may hold anything."""
    if not targets.numel():
        return
    rows = targets.detach().cpu()
    inside = torch.arange(rows.shape[1])[None] < torch.tensor(target_lens)[:, None]
    wrong = inside & ((rows < 0) | (rows >= vocab_size) | (rows == blank))
    if not bool(wrong.any()):
        return
    i, u = wrong.nonzero()[0].tolist()
    token = int(rows[i, u])
    if token == blank:
        raise ValueError(f"targets[{i}, {u}]={token} is the blank id; pass targets without blank, or another blank")
    raise ValueError(
        f"targets[{i}, {u}]={token} is outside of 0..{vocab_size - 1}; "
        f"pass token ids below the vocabulary size {vocab_size}"
    )


def check_topology(topology: str, enc_lens: list[int], target_lens: list[int]) -> None:
    """The topology exists and has at least one path for each utterance."""
    check_choice("topology", topology, TOPOLOGIES)
    if topology == "regular":
        return
    for i, (t, u) in enumerate(zip(enc_lens, target_lens, strict=True)):
        if u > t:
            raise ValueError(
                f"target_lens[{i}]={u} exceeds enc_lens[{i}]={t}: topology {topology!r} emits at most one token "
                "a frame; leave the utterance out, subsample less, or use topology='regular'"
            )


def _check_lengths(
    enc_lens: object, target_lens: object, targets: Tensor, batch: int, frames: int, names: tuple[str, str, str]
) -> Lengths:
    enc_name, target_name, source = names
    enc = _check_lens(
        enc_name, enc_lens, batch, 1, frames, f"{source}.shape[1]", f"pass {source} padded to the longest utterance"
    )
    target = _check_lens(
        target_name, target_lens, batch, 0, targets.shape[1], "targets.shape[1]", "pass targets padded to [B, U]"
    )
    return Lengths(enc, target)


def check_inputs(
    enc: Tensor,
    pred: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    enc_lens: Tensor,
    target_lens: Tensor,
    *,
    topology: str = "regular",
    blank: int = 0,
) -> tuple[Lengths, int]:
    """Check the arguments of `transducer_loss`.

    Returns the true lengths on the host (one device synchronisation on CUDA) and blank as a non-negative id.
    Raises ValueError that names the argument, the index, the value and the remedy.
    """
    _check_tensor("enc", enc, "[B, T, J]", 3, FLOATS)
    _check_tensor("pred", pred, "[B, U+1, J]", 3, FLOATS)
    _check_tensor("weight", weight, "[V, J]", 2, FLOATS)
    _check_tensor("targets", targets, "[B, U]", 2, INTEGERS)
    batch, frames, dim = enc.shape
    _check_size("pred", pred, 0, batch, "enc.shape[0]")
    _check_size("targets", targets, 0, batch, "enc.shape[0]")
    _check_size("pred", pred, 1, targets.shape[1] + 1, "targets.shape[1]+1")
    _check_size("pred", pred, 2, dim, "enc.shape[2]")
    _check_size("weight", weight, 1, dim, "enc.shape[2]")
    others = [("pred", pred), ("weight", weight)]
    if bias is not None:
        _check_tensor("bias", bias, "[V]", 1, FLOATS)
        _check_size("bias", bias, 0, weight.shape[0], "weight.shape[0]")
        others.append(("bias", bias))
    for name, tensor in others:
        _check_device("enc", name, enc, tensor)
        _check_same_dtype("enc", name, enc, tensor)
    _check_device("enc", "targets", enc, targets)
    blank = check_blank(blank, weight.shape[0])
    lengths = _check_lengths(enc_lens, target_lens, targets, batch, frames, ("enc_lens", "target_lens", "enc"))
    check_topology(topology, lengths.enc, lengths.target)
    return lengths, blank


def check_simple(simple: object, method: str, needed: bool, enc: Tensor, weight: Tensor, targets: Tensor) -> None:
    """The trivial joiner's logits, for the methods that need them and for no other."""
    if not needed:
        if simple is not None:
            raise ValueError(f"simple is not used by method {method!r}; pass simple=None")
        return
    if not isinstance(simple, tuple | list) or len(simple) != 2:
        raise ValueError(f"method {method!r} needs simple=(am [B, T, V], lm [B, U+1, V]), the trivial joiner's logits")
    sizes = (enc.shape[1], targets.shape[1] + 1)
    for name, shape, value, size in zip(("am", "lm"), ("[B, T, V]", "[B, U+1, V]"), simple, sizes, strict=True):
        name = f"simple {name}"
        _check_tensor(name, value, shape, 3, FLOATS)
        _check_size(name, value, 0, enc.shape[0], "enc.shape[0]")
        _check_size(name, value, 1, size, "enc.shape[1]" if name.endswith("am") else "targets.shape[1]+1")
        _check_size(name, value, 2, weight.shape[0], "weight.shape[0]")
        _check_device("enc", name, enc, value)
    _check_same_dtype("simple am", "simple lm", *simple)


def check_finite(
    enc: Tensor,
    pred: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    simple: tuple[Tensor, Tensor] | None,
    lengths: Lengths,
) -> None:
    """No NaN or infinity within the lengths; utterance by utterance, so that no second enc is made."""
    rows = [("enc", enc, lengths.enc), ("pred", pred, [u + 1 for u in lengths.target])]
    if simple is not None:
        rows += [("simple am", simple[0], lengths.enc), ("simple lm", simple[1], [u + 1 for u in lengths.target])]
    for name, tensor, lens in rows:
        for i, n in enumerate(lens):
            _check_finite(f"{name}[{i}]", tensor.detach()[i, :n])
    for name, whole in (("weight", weight), ("bias", bias)):
        if whole is not None:
            _check_finite(name, whole.detach())


def _check_finite(name: str, part: Tensor) -> None:
    # a sum is one pass without a copy; it may overflow, so that only the exact test refuses
    if part.numel() and not bool(part.sum().isfinite()) and not bool(part.isfinite().all()):
        at = (~part.isfinite()).nonzero()[0].tolist()
        where = "".join(f"[{i}]" for i in at)
        raise ValueError(
            f"{name}{where}={float(part[tuple(at)])} is not finite; leave the utterance out or look for where it comes "
            "from (check_values=False gives that utterance a loss that is not finite instead)"
        )


def safe_targets(targets: Tensor, lengths: Lengths, vocab_size: int, blank: int) -> tuple[Tensor, Tensor]:
    """Targets [B, U] that index safely, and which utterances held wrong ones, bool [B]."""
    lens = torch.tensor(lengths.target, dtype=torch.int64, device=targets.device)
    inside = torch.arange(targets.shape[1], device=targets.device) < lens[:, None]
    wrong = (targets < 0) | (targets >= vocab_size) | (targets == blank)
    return targets.clamp(0, vocab_size - 1), (inside & wrong).any(1)


def check_logits(
    logits: Tensor, targets: Tensor, logit_lengths: Tensor, target_lengths: Tensor, *, blank: int
) -> tuple[Lengths, int]:
    """Check the arguments of `rnnt_loss`; returns and raises as `check_inputs`."""
    _check_tensor("logits", logits, "[B, T, U+1, V]", 4, FLOATS)
    _check_tensor("targets", targets, "[B, U]", 2, INTEGERS)
    batch, frames, columns, vocab_size = logits.shape
    _check_size("targets", targets, 0, batch, "logits.shape[0]")
    _check_size("logits", logits, 2, targets.shape[1] + 1, "targets.shape[1]+1")
    _check_device("logits", "targets", logits, targets)
    blank = check_blank(blank, vocab_size)
    names = ("logit_lengths", "target_lengths", "logits")
    lengths = _check_lengths(logit_lengths, target_lengths, targets, batch, frames, names)
    check_targets(targets, lengths.target, vocab_size, blank)
    return lengths, blank


def check_lattice(
    blank_log_probs: Tensor, label_log_probs: Tensor, enc_lens: Tensor, target_lens: Tensor, *, topology: str
) -> Lengths:
    """Check the arguments of `lattice_loss`, `occupancy` and `viterbi_alignment`; raises as `check_inputs`."""
    _check_tensor("blank_log_probs", blank_log_probs, "[B, T, U+1]", 3, FLOATS)
    _check_tensor("label_log_probs", label_log_probs, "[B, T, U]", 3, FLOATS)
    batch, frames, columns = blank_log_probs.shape
    _check_size("label_log_probs", label_log_probs, 0, batch, "blank_log_probs.shape[0]")
    _check_size("label_log_probs", label_log_probs, 1, frames, "blank_log_probs.shape[1]")
    _check_size("label_log_probs", label_log_probs, 2, columns - 1, "blank_log_probs.shape[2]-1")
    _check_device("blank_log_probs", "label_log_probs", blank_log_probs, label_log_probs)
    remedy = "pass log-probs padded to the longest utterance"
    enc = _check_lens("enc_lens", enc_lens, batch, 1, frames, "blank_log_probs.shape[1]", remedy)
    target = _check_lens("target_lens", target_lens, batch, 0, columns - 1, "label_log_probs.shape[2]", remedy)
    check_topology(topology, enc, target)
    return Lengths(enc, target)
