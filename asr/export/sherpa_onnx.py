"""Target "sherpa-onnx"."""

from __future__ import annotations

from pathlib import Path

from asr.checkpoint import Loaded
from asr.export.spec import Spec, Written
from asr.export.transducer_files import check_model, write_transducer


def check(loaded: Loaded, spec: Spec) -> None:
    """Raises UserError for a model that sherpa-onnx cannot hold."""
    check_model(loaded, "sherpa-onnx")


def write(loaded: Loaded, folder: Path, spec: Spec) -> Written:
    """Writes the files into a folder."""
    return write_transducer(loaded, folder, spec)
