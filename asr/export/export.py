"""A checkpoint becomes a folder of files for one target."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from asr.checkpoint import Loaded
from asr.errors import UserError
from asr.export import TARGETS, find_target
from asr.export.folder import Manifest, check_writable, sha256_of, write_folder
from asr.export.packages import check_packages, version_of
from asr.export.spec import Spec
from asr.models.transducer import parameter_counts


def check_target(name: str, loaded: Loaded, spec: Spec) -> Any:
    """Everything that can be refused before work starts; the module of the target.

    Raises:
        UserError: an unknown target, a missing package, a model or a setting that the target cannot hold.
    """
    target = find_target(name)
    if loaded.tokenizer.kind == "byte_bpe" and name != "sherpa-onnx":
        raise UserError(
            f"{name} cannot hold tokenizer.kind=byte_bpe: what reads tokens.txt makes no text of bytes; export to "
            "sherpa-onnx, or train with tokenizer.kind=char or bpe"
        )
    check_packages(f"the target {name}", target.extra, *target.packages)
    if (target.offline if spec.chunk_ms == "full" else target.streaming) is None:
        kind = "streams: set a chunk in ms" if spec.chunk_ms == "full" else "whole utterances: set export.chunk_ms=full"
        raise UserError(f"{name} holds only {kind}, not chunk_ms={spec.chunk_ms}")
    module = importlib.import_module(target.module)
    module.check(loaded, spec)
    return module


def export(loaded: Loaded, checkpoint: Path, name: str, out: Path, spec: Spec) -> Manifest:
    """Writes the files of a target into the folder ``out``, all of them or none.

    Args:
        loaded: the checkpoint's model, on the CPU and in evaluation mode.
        checkpoint: its file, noted in export.json.
        name: a name of ``TARGETS``.
        out: new, empty, or an earlier export, which is replaced.
        spec: chunk, context, precisions.

    Raises:
        UserError: see ``check_target``; a folder that cannot be written; a full disk.
    """
    module = check_target(name, loaded, spec)
    check_writable(out)
    counts = parameter_counts(loaded.model)
    manifest = Manifest(
        target=name,
        chunk_ms=spec.chunk_ms,
        left_context_ms=None if spec.chunk_ms == "full" else int(spec.left_context_ms),
        num_mel_bins=loaded.model.config.num_mel_bins,
        vocab_size=loaded.model.vocab_size,
        context_size=loaded.model.config.predictor.context_size,
        parameters=sum(counts[part] for part in ("encoder", "predictor", "joiner")),
        checkpoint=str(checkpoint),
        checkpoint_sha256=sha256_of(checkpoint),
        versions={name: version_of(name) for name in ("torch", *(p.replace("_", "-") for p in TARGETS[name].packages))},
    )

    def fill(folder: Path) -> None:
        manifest.files, manifest.float_layers = module.write(loaded, folder, spec)
        manifest.save(folder)

    write_folder(out, fill)
    return manifest
