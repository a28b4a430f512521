"""``python -m asr.bench NAME [options]``: measurements of training that take several processes."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from asr.cli.guard import Parser, end_of_process, guarded, nearest
from asr.errors import UserError

BENCHMARKS = {"kills": "kill a worker at a random moment, again and again: does the run end as if nothing had been?"}


def _run(argv: Sequence[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        lines = [f"  {name:<10}{text}" for name, text in BENCHMARKS.items()]
        print("\n".join(["usage: python -m asr.bench NAME [options]", "", *lines]))
        return 0
    if argv[0] not in BENCHMARKS:
        raise UserError(f"unknown benchmark {argv[0]}{nearest(argv[0], BENCHMARKS)}; valid: {', '.join(BENCHMARKS)}")
    module = importlib.import_module(f"asr.bench.{argv[0]}")
    parser = Parser(prog=f"python -m asr.bench {argv[0]}", description=module.__doc__)
    module.add_arguments(parser)
    return int(module.run(parser.parse_args(list(argv[1:]))))


if __name__ == "__main__":
    sys.exit(end_of_process(guarded(lambda: _run(sys.argv[1:]))))
