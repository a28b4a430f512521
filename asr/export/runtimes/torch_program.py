"""torch.export's programs, with the search and the features of ``asr.export.onnx_runner``."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from parts import Parts


class Programs(Parts):
    """encoder.pt2, decoder.pt2 and joiner.pt2; whole utterances or streams."""

    version = torch.__version__

    def load_part(self, path: Path) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.load(path).module()

    def set_threads(self, number: int) -> None:
        torch.set_num_threads(number)

    def call(self, part: Any, *arguments: np.ndarray) -> list[np.ndarray]:
        with torch.inference_mode():
            found = part(*(torch.from_numpy(x) for x in arguments))
        return [x.numpy() for x in (found if isinstance(found, tuple) else (found,))]
