"""onnxruntime by the program that travels with the files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime
from parts import RUNNER, Recognizing, load_runner


class Runner(Recognizing):
    """``run.py`` of the export's own folder; where there is none, the file that it would be a copy of."""

    version = onnxruntime.__version__

    def __init__(self, folder: Path, precision: str, options: dict[str, Any]):
        program = folder / "run.py"
        module = load_runner(program if program.is_file() else RUNNER)
        super().__init__(module.Recognizer(folder, precision, options.get("threads", 1)))
