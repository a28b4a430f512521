"""`python -m losses.bench`: time and memory of the losses as a table, or one JSON object a line; plots with --out.

Each method runs in a process of its own. Its gradients are compared with a float64 run first, and what fails is not
timed. Samples during which other processes took more than 5% of the machine are thrown away.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from losses import LOSSES
from losses.bench import grid, peers, plots
from losses.bench.cases import CASES, Name
from losses.bench.measure import PRODUCTS
from losses.bench.run import ExactRunError, Run, table
from losses.bench.sweep import AXES, linearity, sweep


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m losses.bench", description="Time and memory of the losses.")
    parser.add_argument(
        "--case", default="M", help=f"of {', '.join(CASES)}, or BxTxUxV, -full for full lengths; several with commas"
    )
    parser.add_argument("--method", help=f"of yardstick, {', '.join(LOSSES)}; with commas; default: yardstick,fused")
    parser.add_argument("--products", default="bf16,fp32", help="dtype of the joiner's product: bf16, fp32 or both")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch and of the compiled loops")
    parser.add_argument("--samples", type=int, default=5, help="samples of at least half a second each")
    parser.add_argument("--threshold", type=float, default=1e-6, help="occupancy up to which cells are left out")
    parser.add_argument("--vocab-size", type=int, help="instead of that of the case")
    parser.add_argument("--peers", action="store_true", help=f"also, where they import: {', '.join(peers.PEERS)}")
    parser.add_argument("--allow-load", action="store_true", help="keep samples taken under other load, marked")
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of the table")
    parser.add_argument("--out", type=Path, help="folder for results.jsonl, which is appended to, and PNG plots")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument(
        "--error-by-threshold", action="store_true", help="instead of times: gradient error at several thresholds"
    )
    kind.add_argument("--sweep", choices=AXES, help="time and memory along one size around case M")
    kind.add_argument("--linearity", action="store_true", help="fused: time against cells, memory against V")
    kind.add_argument("--grid", action="store_true", help="largest batch in 6 GiB and time an utterance, 10 to 40 s")
    parser.add_argument("--values", help="of --sweep, or vocabulary sizes of --linearity; with commas")
    parser.add_argument("--lengths", help="of --linearity: TxU,TxU,...")
    parser.add_argument("--batches", help="of --linearity: sizes of batches; with commas")
    found = parser.parse_args(arguments)
    found.method = found.method or (",".join(grid.METHODS) if found.grid else "yardstick,fused")
    for name, choices in (("method", ("yardstick", *LOSSES)), ("products", tuple(PRODUCTS))):
        values = getattr(found, name).split(",")
        for value in values:
            if value not in choices:
                parser.error(f"--{name} {value} does not exist; choose from: {', '.join(choices)}")
        setattr(found, name, values)
    found.case = found.case.split(",")
    try:
        for case in found.case:
            Name(case)
        for name in ("values", "batches"):
            value = getattr(found, name)
            setattr(found, name, value and [int(x) for x in value.split(",")])
        found.lengths = found.lengths and [tuple(map(int, x.split("x"))) for x in found.lengths.split(",")]
    except ValueError as error:
        parser.error(str(error))
    if found.peers:
        found.method += peers.available()
    return found


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0, or 1 when a method was wrong or could not be measured."""
    chosen = parse(arguments)
    if chosen.out:
        chosen.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        run = Run(chosen, Path(folder))
        try:
            if chosen.sweep:
                sweep(run, chosen.sweep)
            elif chosen.linearity:
                linearity(run)
            elif chosen.grid:
                grid.grid(run)
            else:
                table(run)
                if chosen.out and not chosen.error_by_threshold:
                    columns = ("median_ms", "ms a step"), ("peak_mb", "MiB above inputs")
                    plots.bars(run.results, chosen.out / "cases.png", columns, f"{chosen.threads} threads")
        except ExactRunError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    return int(run.failed)


if __name__ == "__main__":
    sys.exit(main())
