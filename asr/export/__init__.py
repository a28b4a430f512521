"""Models leave for devices: files that existing runtimes load unchanged, and the proof that they do."""

from __future__ import annotations

from typing import NamedTuple

from asr.errors import UserError


class Target(NamedTuple):
    """A kind of files.

    Args:
        about: one line for users.
        module: has ``check(loaded, spec)`` and ``write(loaded, folder, spec)``.
        extra: of this distribution, which installs what it needs.
        packages: modules that writing and verifying import.
        streaming, offline: adapters of ``asr.export.runtimes.child`` that run the files; None where there are no such.
        inside: the adapter that shows features and encoder output, where that is another one.
    """

    about: str
    module: str
    extra: str
    packages: tuple[str, ...]
    streaming: str | None
    offline: str | None
    inside: str | None


TARGETS = {
    "sherpa-onnx": Target(
        "encoder, decoder and joiner for sherpa-onnx: Android, iOS, Raspberry Pi, C, Go, Swift, Node, WASM",
        "asr.export.sherpa_onnx",
        "export",
        ("onnx", "onnxruntime", "sherpa_onnx"),
        "sherpa-onnx",
        "sherpa-onnx-offline",
        "onnx",
    ),
    "onnx": Target(
        "the same files with run.py, which needs numpy, kaldi-native-fbank and onnxruntime only",
        "asr.export.onnx_files",
        "export",
        ("onnx", "onnxruntime"),
        "onnx",
        "onnx",
        None,
    ),
    "executorch": Target(
        "programs for phones and boards, on XNNPACK, in fp32 and int8; streams",
        "asr.export.executorch_files",
        "executorch",
        ("executorch", "torchao"),
        "executorch",
        None,
        None,
    ),
    "torch.export": Target(
        "programs for torch on servers, any number of streams at once",
        "asr.export.torch_export",
        "",
        (),
        "torch.export",
        "torch.export",
        None,
    ),
}


def find_target(name: str) -> Target:
    """The entry of ``TARGETS``, or a UserError that lists them."""
    if name not in TARGETS:
        raise UserError(f"unknown target {name!r}; choose one of {', '.join(TARGETS)}")
    return TARGETS[name]
