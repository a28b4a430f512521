"""``asr presets``: the named model sizes with their exact numbers of parameters."""

from __future__ import annotations

import argparse

HELP = "Shows the model presets with their exact numbers of parameters, part by part."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--vocab-size", type=int, metavar="V", help="tokens, blank included (default: 500)")


def run(args: argparse.Namespace) -> int:
    import torch

    from asr.config import from_dict
    from asr.errors import UserError
    from asr.models.presets import PRESETS, REFERENCE_VOCAB_SIZE
    from asr.models.transducer import Transducer, parameter_counts

    vocab_size = REFERENCE_VOCAB_SIZE if args.vocab_size is None else args.vocab_size
    if vocab_size < 2:
        raise UserError(f"--vocab-size {vocab_size} is too small; blank and one token make 2")
    print(f"parameters with {vocab_size} tokens, stateless predictor, no CTC head")
    print(f"{'preset':<8}{'total':>14}{'encoder':>14}{'predictor':>12}{'joiner':>12}  layers x dim")
    for name in PRESETS:
        config = from_dict({"model": {"preset": name}}).model
        with torch.device("meta"):  # shapes only: the largest would take half a gigabyte
            counts = parameter_counts(Transducer(config, vocab_size))
        sizes = f"{counts['total']:>14,}{counts['encoder']:>14,}{counts['predictor']:>12,}{counts['joiner']:>12,}"
        print(f"{name:<8}{sizes}  {config.encoder.num_layers} x {config.encoder.dim}")
    return 0
