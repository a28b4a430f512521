"""`python -m losses.bench.memory_limit`: random problems, each with a random limit; whether the loss keeps to it.

A problem's limit is drawn log-uniformly between the smallest that is not refused and half of what method "batched" is
measured to take. It fails when the loss takes more than the limit, or when a limit is refused that method "samplewise"
is measured to meet. Every measurement has a process of its own and is the largest growth of resident memory during a
forward and a backward pass, without the gradients that are left, after a pass over a tiny problem.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from losses.api import transducer_loss
from losses.memory import MemoryLimitError
from losses.shapes import REDUCTIONS, TOPOLOGIES

# Logits of the padded batch: of a smaller one, half of what "batched" takes is about what the code of the products
# takes; of a larger one "batched", with up to 16 bytes each, takes gigabytes.
LOGITS = (4_000_000, 120_000_000)
HUGE = "1TiB"  # a limit that chooses nothing, for the tiny problem
COLUMNS = ("batched", "samplewise", "refusal", "limit", "peak", "peak/limit")
PRODUCTS = ("float32", "bfloat16 autocast", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Problem:
    """Sizes and options of a random batch; lengths are uniform in 50-100%, one utterance is full."""

    batch: int
    frames: int
    tokens: int
    vocab_size: int
    dim: int
    products: str
    topology: str
    reduction: str
    bias: bool
    seed: int
    threads: int = 2

    def __str__(self) -> str:
        sizes = f"B={self.batch} T={self.frames} U={self.tokens} V={self.vocab_size} J={self.dim}"
        return f"{sizes} {self.products} {self.topology} {self.reduction}"


def draw(seed: int, threads: int = 2) -> Problem:
    """A random problem: B 2-16, T 50-400, U 5-100, V 50-2000, J 64-640, of LOGITS padded logits."""
    random = np.random.default_rng(seed)
    while True:
        sizes = [int(random.integers(a, b + 1)) for a, b in ((2, 16), (50, 400), (5, 100), (50, 2000), (64, 640))]
        batch, frames, tokens, vocab_size, dim = sizes
        if LOGITS[0] <= batch * frames * (tokens + 1) * vocab_size <= LOGITS[1]:
            break
    products, topology, reduction = (str(random.choice(x)) for x in (PRODUCTS, TOPOLOGIES, REDUCTIONS))
    tokens = tokens if topology == "regular" else min(tokens, frames // 2)
    return Problem(
        batch, frames, tokens, vocab_size, dim, products, topology, reduction, bool(random.integers(2)), seed, threads
    )


class Inputs(NamedTuple):
    """enc, pred, weight and, if the problem has one, bias; targets and lengths; trivial joiner's logits of "pruned"."""

    sources: list[Tensor]
    others: tuple[Tensor, Tensor, Tensor]
    simple: tuple[Tensor, Tensor] | None


def make(problem: Problem, method: str) -> Inputs:
    """Seeded tensors."""
    generator = torch.Generator().manual_seed(problem.seed)
    batch, dim = problem.batch, problem.dim

    def lens(most: int) -> Tensor:
        found = torch.randint(-(-most // 2), most + 1, (batch,), generator=generator)
        found[0] = most
        return found

    def normal(scale: float, *shape: int) -> Tensor:
        dtype = torch.bfloat16 if problem.products == "bfloat16" else torch.float32
        return torch.randn(*shape, generator=generator).mul_(scale).to(dtype).requires_grad_()

    sources = [normal(0.5, batch, problem.frames, dim), normal(0.5, batch, problem.tokens + 1, dim)]
    sources.append(normal(dim**-0.5, problem.vocab_size, dim))
    if problem.bias:
        sources.append(normal(0.1, problem.vocab_size))
    targets = torch.randint(1, problem.vocab_size, (batch, problem.tokens), generator=generator)
    others = targets, lens(problem.frames), lens(problem.tokens)
    if method != "pruned":
        return Inputs(sources, others, None)
    am, lm = (normal(0.5, batch, n, problem.vocab_size) for n in (problem.frames, problem.tokens + 1))
    return Inputs(sources, others, (am, lm))


def step(problem: Problem, inputs: Inputs, method: str, limit: str | None) -> tuple[int, str]:
    """Forward and backward; bytes of the gradients that are left, and the plan."""
    enc, pred, weight, *bias = inputs.sources
    with torch.autocast("cpu", torch.bfloat16, enabled=problem.products.endswith("autocast")):
        found = transducer_loss(
            enc, pred, weight, bias[0] if bias else None, *inputs.others, method=method, topology=problem.topology,
            reduction=problem.reduction, memory_limit=limit, simple=inputs.simple,
        )  # fmt: skip
    total = found.loss.sum() if found.simple_loss is None else found.loss.sum() + found.simple_loss.sum()
    total.backward()
    gradients = [x.grad for x in (*inputs.sources, *(inputs.simple or ())) if x.grad is not None]
    return sum(x.numel() * x.itemsize for x in gradients), found.info.get("memory_plan", "")


def _memory(key: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")


def peak_bytes(problem: Problem, method: str, limit: str | None) -> tuple[int, str]:
    """Largest growth of resident memory during a step, without the gradients that it leaves; and the plan."""
    torch.set_num_threads(problem.threads)
    inputs = make(problem, method)
    tiny = dataclasses.replace(problem, batch=2, frames=20, tokens=5, vocab_size=50)
    for warm in dict.fromkeys((method, "fused")):  # which may stand in
        step(tiny, make(tiny, warm), warm, limit and HUGE)
    Path("/proc/self/clear_refs").write_text("5")
    before = _memory("VmRSS")
    left, plan = step(problem, inputs, method, limit)
    return _memory("VmHWM") - before - left, plan


def smallest_limit(problem: Problem, method: str = "fused") -> int:
    """The limit that the refusal of one byte names."""
    threads = torch.get_num_threads()
    torch.set_num_threads(problem.threads)
    try:
        step(problem, make(problem, method), method, "1B")
    except MemoryLimitError as error:
        return error.smallest
    finally:
        torch.set_num_threads(threads)
    raise AssertionError("a limit of one byte was not refused")


def child(problem: Problem, method: str, limit: str | None = None) -> dict[str, Any]:
    """The measurement in a process of its own."""
    given = json.dumps({"problem": dataclasses.asdict(problem), "method": method, "limit": limit})
    environment = {**os.environ, "OMP_NUM_THREADS": str(problem.threads)}
    command = [sys.executable, "-m", "losses.bench.memory_limit", "--child", given]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"{problem}, method {method}: exit {done.returncode}: {last}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def measure(problem: Problem) -> dict[str, Any]:
    """All numbers of one problem in bytes, the plan, and "failures", a list of what went wrong."""
    batched, samplewise = (child(problem, method)["peak"] for method in ("batched", "samplewise"))
    refusal = smallest_limit(problem)
    failures = []
    if refusal > samplewise:
        failures.append("refuses a limit that samplewise meets")
    result = {"problem": str(problem), "batched": batched, "samplewise": samplewise, "refusal": refusal}
    if refusal > batched / 2:
        return {**result, "failures": [*failures, "refuses half of what batched takes"]}
    share = np.random.default_rng(problem.seed + 1_000_000).random()
    limit = math.ceil(math.exp(math.log(refusal) + share * math.log(batched / 2 / refusal)))
    found = child(problem, "fused", str(limit))
    if found["peak"] > limit:
        failures.append("takes more than its limit")
    return {**result, "limit": limit, **found, "peak/limit": found["peak"] / limit, "failures": failures}


def row(result: dict[str, Any]) -> str:
    """A line of the table."""
    cells = []
    for name in COLUMNS:
        value = result.get(name, math.nan)
        cells.append(f"{value:>11.2f}" if "/" in name else f"{value / 2**20:>11.2f}")
    plan = str(result.get("plan", "")).partition(":")[2]
    return f"{''.join(cells)}  {result['problem']}:{plan}" + "".join(f"  FAILS: {x}" for x in result["failures"])


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0, or 1 when a problem failed."""
    parser = argparse.ArgumentParser(prog="python -m losses.bench.memory_limit", description=__doc__)
    parser.add_argument("--problems", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the first problem; the others follow")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch and of the compiled loops")
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of the table")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.child:
        given = json.loads(chosen.child)
        peak, plan = peak_bytes(Problem(**given["problem"]), given["method"], given["limit"])
        print(json.dumps({"peak": peak, "plan": plan}), flush=True)
        return 0
    if not chosen.json:
        print("".join(f"{c:>11}" for c in COLUMNS) + "  problem and plan (sizes in MiB)")
    results = []
    for seed in range(chosen.seed, chosen.seed + chosen.problems):
        results.append(measure(draw(seed, chosen.threads)))
        print(json.dumps(results[-1]) if chosen.json else row(results[-1]), flush=True)
    failed = sum(bool(r["failures"]) for r in results)
    worst = max((r.get("peak/limit", 0.0) for r in results), default=0.0)
    if not chosen.json:
        print(f"{len(results) - failed} of {len(results)} kept to their limits; largest peak/limit {worst:.2f}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
