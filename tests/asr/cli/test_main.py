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


def test_help_does_not_load_torch() -> None:
    code = "import sys; from asr.cli.main import main; main(['--help']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_training_help_lists_every_setting_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help-keys"]) == 0
    shown = capsys.readouterr().out
    assert "--optim.lr" in shown and "--model.preset" in shown and "default" in shown
