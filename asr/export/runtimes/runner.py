"""onnxruntime by the program that travels with the files."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime


class Runner:
    """``run.py`` of the export's own folder; where there is none, the file that it would be a copy of."""

    def __init__(self, folder: Path, precision: str, options: dict[str, Any]):
        self.version = onnxruntime.__version__
        program = folder / "run.py"
        if not program.is_file():
            program = Path(__file__).resolve().parent.parent / "onnx_runner.py"
        spec = importlib.util.spec_from_file_location("exported_runner", program)
        if spec is None or spec.loader is None:
            raise RuntimeError(f"{program} is no program")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        self._recognizer = module.Recognizer(folder, precision, options.get("threads", 1))

    def tensors(self, samples: np.ndarray) -> dict[str, np.ndarray]:
        """Features, and encoder output projected for the joiner, of a waveform."""
        stream = self._recognizer.open()
        stream.accept(samples)
        stream.finish(tail=False)
        features = stream.features
        outs = []
        while stream.ready:
            outs.append(self._recognizer.encode([stream])[0])
        return {"features": features, "encoder_out": np.concatenate(outs)}

    def open(self) -> Any:
        return self._recognizer.open()

    def accept(self, stream: Any, samples: np.ndarray) -> None:
        stream.accept(samples)

    def finish(self, stream: Any) -> None:
        stream.finish(tail=False)

    def advance(self, streams: list[Any]) -> list[Any]:
        return self._recognizer.advance(streams)  # type: ignore[no-any-return]

    def result(self, stream: Any) -> tuple[list[int], list[int]]:
        return stream.tokens, stream.frames

    def reset(self, stream: Any) -> None:
        self._recognizer.reset(stream)
