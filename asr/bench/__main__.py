"""``python -m asr.bench NAME [options]``: measurements that take longer than a test, or several processes."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence

from asr.cli.guard import Parser, end_of_process, guarded, nearest
from asr.errors import UserError

BENCHMARKS = {
    "data": "what reading, augmentation and features cost, and whether training waits for them",
    "kills": "kill a worker at a random moment, again and again: does the run end as if nothing had been?",
    "long-audio": "transcribe a file of hours: memory above the model, and time",
    "parallel": "training on several processes, and within a limit of memory: equality, memory, speed",
    "streaming": "decoding as audio comes: time of a chunk, and how many times real time many streams are decoded",
}


def _run(prog: str, package: str, choices: Mapping[str, str], argv: Sequence[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        lines = [f"  {name:<14}{text}" for name, text in choices.items()]
        print("\n".join([f"usage: {prog} NAME [options]", "", *lines]))
        return 0
    name = argv[0]
    if name not in choices:
        raise UserError(f"unknown benchmark {name}{nearest(name, choices)}; valid: {', '.join(choices)}")
    module = importlib.import_module(f"{package}.{name.replace('-', '_')}")
    prog = f"{prog} {name}"
    if hasattr(module, "MEASUREMENTS"):
        return _run(prog, module.__name__, module.MEASUREMENTS, argv[1:])
    parser = Parser(prog=prog, description=module.__doc__)
    module.add_arguments(parser)
    return int(module.run(parser.parse_args(list(argv[1:]))))


def main(argv: Sequence[str]) -> int:
    """Exit status; an error of the user is told in one line."""
    return guarded(lambda: _run("python -m asr.bench", "asr.bench", BENCHMARKS, argv))


if __name__ == "__main__":
    sys.exit(end_of_process(main(sys.argv[1:])))
