"""Target "onnx": the files of sherpa-onnx with a program that runs them in onnxruntime alone."""

from __future__ import annotations

import shutil
from pathlib import Path

from asr.checkpoint import Loaded
from asr.export import onnx_runner
from asr.export.spec import Spec, Written
from asr.export.transducer_files import check_model, write_transducer

RUNNER = "run.py"


def check(loaded: Loaded, spec: Spec) -> None:
    """Raises UserError for a model that the files cannot hold."""
    check_model(loaded, "onnx")


def write(loaded: Loaded, folder: Path, spec: Spec) -> Written:
    """Writes the files into a folder."""
    shutil.copyfile(onnx_runner.__file__, folder / RUNNER)
    return write_transducer(loaded, folder, spec)
