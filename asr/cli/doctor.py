"""`asr doctor`: what is installed, what the devices can do, what is missing, and whether the basics work."""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import sys
from typing import Any

from asr import environment

HELP = "show versions, devices and optional parts, and how to install what is missing"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print everything as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print the findings; 0 when every required package is there and the self-test passes, else 1."""
    found = collect()
    print(json.dumps(found, indent=2) if args.json else "\n".join(lines(found)))
    return 0 if found["ok"] else 1


def collect() -> dict[str, Any]:
    """All findings, as they are printed by --json."""
    own = environment.own_distribution()
    packages = {name: environment.distribution_version(name) for name in environment.REQUIRED}
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "executable": sys.executable,
        "platform": platform.platform(),
        "package": environment.distribution_version(own) if own else "",
        "packages": packages,
        "cpu": environment.cpu(),
        "cuda": [],
    }
    if packages["torch"]:
        found["cpu"] |= {**environment.precision("cpu"), "bf16_speed_ratio": round(environment.bf16_speed_ratio(), 2)}
        found["cuda"] = environment.cuda_devices()
    states = environment.probe_all(environment.optional_parts())
    found["optional"] = [
        {"name": s.part.name, "state": s.state, "version": s.version, "detail": s.detail, "unlocks": s.part.unlocks,
         "install": s.part.install} for s in states
    ]  # fmt: skip
    found["self_test"] = [dataclasses.asdict(check) for check in environment.self_test()]
    found["ok"] = all(packages.values()) and all(check["ok"] for check in found["self_test"])
    return found


def lines(found: dict[str, Any]) -> list[str]:
    """The findings as aligned text."""
    system = [("python", f"{found['python']}  {found['executable']}"), ("platform", found["platform"])]
    packages = [(name, at or "missing: pip install " + name) for name, at in found["packages"].items()]
    out = _block("System", [("this package", found["package"] or "run from a checkout"), *system])
    out += _block("Packages", packages)
    out += _block("Devices", _devices(found))
    out += _block("Optional parts", [(f"{p['name']}", _part(p)) for p in found["optional"]])
    missing = [(p["name"], p["install"]) for p in found["optional"] if p["state"] != "ok"]
    out += _block("To install them", missing) if missing else []
    checks = [(c["name"], f"{'ok' if c['ok'] else 'FAILED':<8} {c['detail']}") for c in found["self_test"]]
    out += _block("Self-test", checks)
    return [*out, "Everything that is needed works." if found["ok"] else "Something needed does not work; see above."]


def _block(title: str, rows: list[tuple[str, str]]) -> list[str]:
    return [title, *(f"  {name:<20}{value}" for name, value in rows), ""]


def _devices(found: dict[str, Any]) -> list[tuple[str, str]]:
    cpu = found["cpu"]
    memory = f", {cpu['memory_gib']} GiB memory" if "memory_gib" in cpu else ""
    memory += f" ({cpu['memory_available_gib']} available)" if "memory_available_gib" in cpu else ""
    rows = [("cpu", f"{cpu['model']}, {cpu['cores']} cores{memory}")]
    rows.append(("", "instruction sets: " + (" ".join(cpu["instruction_sets"]) or "none that matters")))
    if "auto" in cpu:
        why = "bf16 runs in hardware" if cpu["native_bf16"] else "bf16 is emulated"
        rows.append(("", f"training.precision=auto means {cpu['auto']}: {why}, {cpu['bf16_speed_ratio']:.1f} times the "
                         "speed of fp32 in a matrix product"))  # fmt: skip
    for i, gpu in enumerate(found["cuda"]):
        rows.append((f"cuda:{i}", f"{gpu['name']}, {gpu['memory_gib']} GiB, compute capability {gpu['capability']}, "
                                  f"auto means {gpu['auto']}"))  # fmt: skip
    return rows if found["cuda"] else [*rows, ("cuda", "none that torch can use")]


def _part(part: dict[str, str]) -> str:
    version = part["version"] if part["state"] == "ok" else ""
    why = f"  [{part['detail']}]" if part["detail"] else ""
    return f"{part['state']:<8} {version:<10} {part['unlocks']}{why}"
