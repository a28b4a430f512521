"""The wheel holds every package, the recipes' settings and the report's parts, and nothing else."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def _expected_packages() -> set[str]:
    found = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for top in ("asr", "losses", "recipes")
        for path in (ROOT / top).rglob("*.py")
    }
    return found | {f"recipes.egs.{path.parent.name}.conf" for path in (ROOT / "egs").glob("*/conf")}


def test_every_package_is_listed() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    assert set(settings["packages"]) == _expected_packages()
    for package, folder in settings["package-dir"].items():
        assert package in settings["packages"]
        assert list((ROOT / folder).glob("*.yaml")), folder


@pytest.mark.slow
def test_a_wheel_works_outside_the_checkout(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, timeout=280)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
        names = set(archive.namelist())
    assert {"asr/training/report_template.html", "recipes/egs/yesno/conf/train.yaml"} <= names
    code = (
        f"import sys; sys.path.insert(0, {str(site)!r})\n"
        "import recipes.cli, asr.cli.main\n"
        f"assert recipes.cli.__file__.startswith({str(site)!r})\n"
        "sys.exit(recipes.cli.main(['yesno', '--dry-run', '--exp-dir', 'exp']))"
    )
    run = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert "stage" in run.stdout
