"""The folder of an export: whole or not there, with a note of what it holds."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from asr.atomic import partial_name, sync_folder
from asr.errors import UserError
from asr.models.context import Milliseconds

MANIFEST = "export.json"
FORMAT = 1


@dataclass
class Manifest:
    """What a folder holds; ``export.json``.

    Args:
        target: a name of ``TARGETS``.
        chunk_ms: what the files hear at a time; "full" for whole utterances.
        left_context_ms: of streaming files; None for whole utterances.
        files: for each precision, the file of each part: encoder, predictor, joiner.
        num_mel_bins, vocab_size, context_size: of the model.
        parameters: of encoder, predictor and joiner together.
        checkpoint, checkpoint_sha256: where the weights are from.
        float_layers: for int8, weight matrices that stay in float.
        versions: of the packages that wrote the files.
    """

    target: str
    chunk_ms: Milliseconds
    left_context_ms: int | None
    num_mel_bins: int
    vocab_size: int
    context_size: int
    parameters: int
    checkpoint: str
    checkpoint_sha256: str
    files: dict[str, dict[str, str]] = field(default_factory=dict)
    float_layers: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    format: int = FORMAT

    def save(self, folder: Path) -> None:
        """Writes export.json."""
        (folder / MANIFEST).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @staticmethod
    def load(folder: Path) -> Manifest:
        """Reads export.json.

        Raises:
            UserError: there is none, or of another format.
        """
        path = folder / MANIFEST
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except OSError:
            raise UserError(f"{folder} holds no {MANIFEST}; pass a folder that `asr export` wrote") from None
        except ValueError:
            raise UserError(f"{path} is damaged; export again") from None
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise UserError(f"{path} is not of format {FORMAT}, which this version reads; export again")
        return Manifest(**found)


def check_writable(out: Path) -> None:
    """Raises UserError unless ``out`` can become the folder of an export: new, empty, or an export to replace."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; choose a folder")
    if out.is_dir() and any(out.iterdir()) and not (out / MANIFEST).is_file():
        raise UserError(f"{out} holds something else; choose an empty or a new folder")
    parent = out.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not (parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)):
        raise UserError(f"{parent} is not a folder that can be written to; choose another --out")


def write_folder(out: Path, fill: Callable[[Path], None]) -> None:
    """Lets ``fill`` write into a hidden folder beside ``out``, which then takes its place.

    Raises:
        UserError: the disk is full or not writable; what was there is untouched and nothing half-written stays.
    """
    check_writable(out)
    partial = partial_name(out.absolute())
    try:
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        fill(partial)
        for path in partial.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        if out.exists():
            shutil.rmtree(out)
        os.replace(partial, out)
        sync_folder(out.absolute().parent)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"cannot write {out}: {error.strerror or error}") from None
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def sha256_of(path: Path) -> str:
    """Hexadecimal checksum of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
