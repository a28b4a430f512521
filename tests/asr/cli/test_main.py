"""The ``asr`` command finds its subcommands, and is quick to say what it can do."""

from __future__ import annotations

import subprocess
import sys

import pytest

from asr.cli.main import COMMANDS, main


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert main([]) == 0
    assert capsys.readouterr().out == shown
    for name, text in COMMANDS.items():
        assert f"  {name} " in shown and text in shown


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    assert f"usage: asr {name}" in capsys.readouterr().out


def test_presets_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["presets"]) == 0
    rows = {line.split()[0]: line.split()[1] for line in capsys.readouterr().out.splitlines()[2:]}
    assert list(rows) == ["xs", "s", "m", "l", "xl", "xxl"]
    for name, millions in {"xs": 0.3, "l": 30.9, "xxl": 118.0}.items():
        assert int(rows[name].replace(",", "")) / 1e6 == pytest.approx(millions, rel=0.02)


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip()


def test_help_does_not_load_torch() -> None:
    code = "import sys; from asr.cli.main import main; main(['--help']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", ["asr.cli.main", "recipes.cli"])
def test_sigterm_while_the_interpreter_shuts_down_leaves_the_exit_code(module: str) -> None:
    code = f"import atexit, os, signal, sys, {module} as cli; sys.argv[1:] = ['--help']; "
    code += "atexit.register(os.kill, os.getpid(), signal.SIGTERM); sys.exit(cli.main())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_training_help_lists_every_setting_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help-keys"]) == 0
    shown = capsys.readouterr().out
    assert "--optim.lr" in shown and "--model.preset" in shown and "default" in shown
