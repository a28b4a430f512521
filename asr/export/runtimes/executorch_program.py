"""ExecuTorch's programs, with the search and the features of ``asr.export.onnx_runner``."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from executorch.runtime import Runtime
from parts import Parts


class Programs(Parts):
    """encoder.pte, decoder.pte and joiner.pte; streams, one in a call."""

    version = version("executorch")
    at_once = 1
    counter = np.float32

    def load_part(self, path: Path) -> Any:
        program = Runtime.get().load_program(path)
        # a method alone does not keep what it runs from
        return program, program.load_method("forward")

    def call(self, part: Any, *arguments: np.ndarray) -> list[np.ndarray]:
        # of a size of 1 numpy and torch allow any stride, and ExecuTorch does not
        plain = [torch.from_numpy(x).clone(memory_format=torch.contiguous_format) for x in arguments]
        found = part[1].execute(plain)
        return [x.numpy().copy() for x in found]
