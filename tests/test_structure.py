"""The rules of the source tree, read from the files themselves: import direction, sizes, names, environment variables.

Each rule is a function from a tree to a list of complaints; it is run on the project, which must give none, and on a
small bad tree, which must give one, so that a rule that has stopped looking is noticed.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("losses", "asr", "recipes")
MAX_LINES = 600

# What losses may import besides itself and the standard library: llvmlite is a part of numba, triton compiles for GPUs.
LOSSES_MAY_IMPORT = {"torch", "numba", "llvmlite", "numpy", "triton"}
# losses <- asr <- recipes: what each package must not import.
MUST_NOT_IMPORT = {"losses": {"asr", "recipes", "tests"}, "asr": {"recipes", "tests"}, "recipes": {"tests"}}
# Optional peers that losses may import inside a function only, when they were asked for by name.
LOSSES_OPTIONAL = {"k2", "torchaudio"}
# The same for losses/bench alone: other losses that are measured beside, and the drawing of plots.
BENCH_OPTIONAL = LOSSES_OPTIONAL | {"fast_rnnt", "warprnnt_numba", "matplotlib"}

# Environment variables that torchrun sets; nothing else may change behaviour.
TORCHRUN_VARIABLES = {
    "RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "ROLE_WORLD_SIZE",
    "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_MAX_RESTARTS", "TORCHELASTIC_RUN_ID",
    "TORCHELASTIC_USE_AGENT_STORE",
}  # fmt: skip
# Files that may touch other variables, each with the variables: only such that users know from elsewhere and that do
# not change results.
ENVIRONMENT_EXCEPTIONS: dict[str, set[str]] = {"asr/training/memory.py": {"MALLOC_MMAP_THRESHOLD_"}}


def source_files(root: Path) -> list[Path]:
    return sorted(p for package in PACKAGES for p in (root / package).rglob("*.py"))


def imported_modules(path: Path) -> Iterator[tuple[str, int, bool]]:
    """(full module name, line, whether at module level) of every absolute import."""
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    top_level = {id(node) for statement in tree.body if not _is_scope(statement) for node in ast.walk(statement)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno, id(node) in top_level
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module, node.lineno, id(node) in top_level
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "__import__"):
            if node.args and isinstance(node.args[0], ast.Constant):
                yield str(node.args[0].value), node.lineno, False


def _is_scope(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)


def import_direction(root: Path) -> list[str]:
    bad = []
    for path in source_files(root):
        package = path.relative_to(root).parts[0]
        optional = BENCH_OPTIONAL if path.relative_to(root).parts[:2] == ("losses", "bench") else LOSSES_OPTIONAL
        for module, line, top_level in imported_modules(path):
            top = module.partition(".")[0]
            where = f"{path.relative_to(root)}:{line} imports {module}"
            if top in MUST_NOT_IMPORT[package]:
                bad.append(f"{where}; the direction is losses <- asr <- recipes")
            if package == "losses" and top not in sys.stdlib_module_names | LOSSES_MAY_IMPORT | {"losses"}:
                if top not in optional or top_level:
                    bad.append(f"{where}; losses imports torch, numba, numpy and the standard library only")
    return bad


def file_sizes(root: Path) -> list[str]:
    bad = []
    for path in [*source_files(root), *sorted((root / "tests").rglob("*.py"))]:
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > MAX_LINES:
            bad.append(f"{path.relative_to(root)} has {lines} lines; at most {MAX_LINES}")
    return bad


def file_names(root: Path) -> list[str]:
    files = [*source_files(root), *(root / "tests").rglob("*.py")]
    return [f"{p.relative_to(root)}: name the topic" for p in files if p.stem in ("utils", "util", "helpers", "misc")]


def missing_init_files(root: Path) -> list[str]:
    folders = {p.parent for package in (*PACKAGES, "tests") for p in (root / package).rglob("*.py")}
    folders |= {q for p in folders for q in p.parents if root in q.parents}
    return [f"{p.relative_to(root)} has no __init__.py" for p in sorted(folders) if not (p / "__init__.py").exists()]


def python_in_egs(root: Path) -> list[str]:
    bad = []
    for path in sorted((root / "egs").rglob("*")):
        inside = path.relative_to(root / "egs").parts[1:2]
        if inside in (("data",), ("exp",)):  # what runs wrote
            continue
        if path.suffix in (".py", ".ipynb") or path.is_symlink():
            bad.append(f"{path.relative_to(root)}: egs holds configuration and run.sh only, no Python and no links")
    return bad


class EnvironmentReads(ast.NodeVisitor):
    """Collects (variable, line) of every use of os.environ and os.getenv; "*" when the name is not a literal.

    Copying the whole environment for a child process (`{**os.environ}`, `os.environ.copy()`, `dict(os.environ)`) is no
    read of a variable.
    """

    def __init__(self) -> None:
        self.reads: list[tuple[str, int]] = []

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if node.module == "os" and any(alias.name in ("environ", "getenv", "environb") for alias in node.names):
            self.reads.append(("*", node.lineno))

    def visit_Subscript(self, node: ast.Subscript) -> None:
        if _is_environ(node.value):
            self._note(node.slice, node.lineno)
        else:
            self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        name = ast.unparse(node.func)
        if name in ("os.environ.get", "os.getenv", "os.environ.setdefault", "os.environ.pop", "os.putenv"):
            self._note(node.args[0], node.lineno)
        elif name == "os.environ.copy" or (name == "dict" and node.args and _is_environ(node.args[0])):
            return
        else:
            self.generic_visit(node)

    def visit_Dict(self, node: ast.Dict) -> None:
        for key, value in zip(node.keys, node.values, strict=True):
            if key is None and _is_environ(value):
                continue
            self.visit(value)

    def visit_Compare(self, node: ast.Compare) -> None:
        if any(_is_environ(c) for c in node.comparators):
            self._note(node.left, node.lineno)
        else:
            self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if _is_environ(node) or ast.unparse(node) in ("os.getenv", "os.environb"):
            self.reads.append(("*", node.lineno))
        else:
            self.generic_visit(node)

    def _note(self, name: ast.expr, line: int) -> None:
        self.reads.append((name.value if isinstance(name, ast.Constant) else "*", line))


def _is_environ(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and ast.unparse(node) == "os.environ"


def environment_reads(root: Path) -> list[str]:
    bad = []
    for path in source_files(root):
        visitor = EnvironmentReads()
        visitor.visit(ast.parse(path.read_text(encoding="utf-8"), filename=str(path)))
        name = path.relative_to(root).as_posix()
        allowed = TORCHRUN_VARIABLES | ENVIRONMENT_EXCEPTIONS.get(name, set())
        bad += [f"{name}:{line} uses the variable {v}" for v, line in visitor.reads if v not in allowed]
    return bad


RULES = [import_direction, file_sizes, file_names, missing_init_files, python_in_egs, environment_reads]


@pytest.mark.parametrize("rule", RULES)
def test_the_project_keeps_the_rule(rule: Callable[[Path], list[str]]) -> None:
    assert len(source_files(ROOT)) > 10
    complaints = rule(ROOT)
    assert not complaints, "\n" + "\n".join(complaints)


BREACHES = [
    (import_direction, "losses/a.py", "import asr.config\n"),
    (import_direction, "losses/a.py", "def f():\n    from recipes import engine\n"),
    (import_direction, "losses/a.py", "import scipy\n"),
    (import_direction, "losses/a.py", "import k2\n"),
    (import_direction, "losses/a.py", "def f():\n    import matplotlib\n"),
    (import_direction, "losses/bench/a.py", "import matplotlib\n"),
    (import_direction, "losses/a.py", "import importlib\nimportlib.import_module('asr')\n"),
    (import_direction, "asr/a.py", "from recipes.engine import Stage\n"),
    (file_sizes, "asr/a.py", "x = 1\n" * (MAX_LINES + 1)),
    (file_names, "asr/data/utils.py", ""),
    (missing_init_files, "tests/asr/deep/test_a.py", ""),
    (python_in_egs, "egs/yesno/local/prepare.py", ""),
    (environment_reads, "asr/a.py", "import os\nx = os.environ['HOME']\n"),
    (environment_reads, "asr/a.py", "import os\nx = os.environ.get('FAST')\n"),
    (environment_reads, "asr/a.py", "import os\nx = os.getenv('FAST')\n"),
    (environment_reads, "asr/a.py", "import os\nx = 'FAST' in os.environ\n"),
    (environment_reads, "asr/a.py", "import os\ne = os.environ\n"),
    (environment_reads, "asr/a.py", "from os import environ\n"),
]


@pytest.mark.parametrize(("rule", "name", "text"), BREACHES)
def test_the_rule_sees_a_breach(tmp_path: Path, rule: Callable[[Path], list[str]], name: str, text: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert len(rule(tmp_path)) >= 1


ALLOWED = [
    (import_direction, "losses/a.py", "import math\nimport torch\nfrom losses.shapes import check\n"),
    (import_direction, "losses/a.py", "def f():\n    import k2\n"),
    (import_direction, "losses/bench/a.py", "def f():\n    from matplotlib.figure import Figure\n"),
    (import_direction, "recipes/a.py", "from asr.config import Experiment\nimport losses\n"),
    (python_in_egs, "egs/yesno/exp/run/code.py", ""),
    (environment_reads, "asr/a.py", "import os\nx = int(os.environ.get('WORLD_SIZE', '1'))\n"),
    (environment_reads, "asr/a.py", "import os\nx = {**os.environ, 'A': 'b'}\ny = os.environ.copy()\n"),
]


@pytest.mark.parametrize(("rule", "name", "text"), ALLOWED)
def test_the_rule_allows(tmp_path: Path, rule: Callable[[Path], list[str]], name: str, text: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert rule(tmp_path) == []
