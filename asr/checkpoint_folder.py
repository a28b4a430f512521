"""The form of a checkpoint that several processes write: a folder in the format of torch.distributed.checkpoint.

    __0_0.distcp __1_0.distcp ...   tensors, each process's own shares
    .metadata                       which share of which tensor lies where, by torch.distributed.checkpoint
    checkpoint.json                 everything but tensors; size and SHA-256 of each file, and of itself

The content is that of a checkpoint file: a tree of dicts. The name of a tensor is its path in the tree, with slashes.
Reading takes no process group.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from asr.atomic import write_whole
from asr.errors import CheckpointError

if TYPE_CHECKING:
    from torch.distributed.checkpoint import Metadata

MANIFEST = "checkpoint.json"
METADATA = ".metadata"
# What .metadata may refer to: a pickle that names anything else is not loaded, since it could run it.
ALLOWED = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
}  # fmt: skip


def split(tree: dict[str, Any], prefix: str = "") -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What of a tree is not tensors, as a tree; and its tensors by their path."""
    plain: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for name, value in tree.items():
        if isinstance(value, Tensor):
            tensors[prefix + name] = value
        elif isinstance(value, dict):
            inner, found = split(value, f"{prefix}{name}/")
            tensors |= found
            if inner or not found:
                plain[name] = inner
        else:
            plain[name] = value
    return plain, tensors


def join(plain: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The tree of which `split` made both; tensors are put into ``plain``."""
    for path, tensor in tensors.items():
        *names, last = path.split("/")
        node = plain
        for name in names:
            node = node.setdefault(name, {})
        node[last] = tensor
    return plain


def fingerprint(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file."""
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def write_manifest(folder: Path, content: dict[str, Any], files: dict[str, dict[str, Any]]) -> None:
    """Writes checkpoint.json, on the disk when this returns.

    Args:
        folder: of the checkpoint.
        content: everything but tensors; plain values.
        files: name and `fingerprint` of every other file.
    """
    body = {"content": content, "files": files}
    text = json.dumps({**body, "sha256": _digest(body)}, indent=1)
    write_whole(folder / MANIFEST, lambda file: file.write(text.encode()))


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body).encode()).hexdigest()


def _damaged(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"checkpoint {path} is corrupt or no checkpoint ({reason})")


def read_manifest(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Content and files of `write_manifest`.

    Raises:
        CheckpointError: missing or damaged.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        body = {name: manifest[name] for name in ("content", "files")}
        whole = manifest["sha256"] == _digest(body)
    except OSError as err:
        raise _damaged(path, f"{MANIFEST}: {err.strerror or err}") from None
    except (ValueError, KeyError, TypeError):
        raise _damaged(path, f"{MANIFEST} is not what was written") from None
    if not whole:
        raise _damaged(path, f"{MANIFEST} does not match its checksum")
    return body["content"], body["files"]


def verify(path: Path) -> None:
    """Reads every byte.

    Raises:
        CheckpointError: a file is missing or is not the one that was written.
    """
    _, files = read_manifest(path)
    for name, want in files.items():
        try:
            size = (path / name).stat().st_size
            if size != want["bytes"]:
                raise _damaged(path, f"{name} has {size} bytes of {want['bytes']}")
            if fingerprint(path / name) != want:
                raise _damaged(path, f"{name} does not match its checksum")
        except OSError as err:
            raise _damaged(path, f"{name}: {err.strerror or err}") from None


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in ALLOWED.get(module, ()) or module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it refers to {module}.{name}")


def _metadata(path: Path) -> Metadata:
    try:
        with open(path / METADATA, "rb") as file:
            return _Unpickler(file).load()  # type: ignore[no-any-return]
    except Exception as err:  # pickle raises whatever the bytes lead to
        raise _damaged(path, f"{METADATA}: {' '.join(str(err).split())[:160]}") from None


def outline(path: Path) -> dict[str, Any]:
    """The content of a checkpoint, with tensors on the meta device: their shapes and types alone.

    Raises:
        CheckpointError: damaged; the files with the tensors are not read, see `verify`.
    """
    content, _ = read_manifest(path)
    entries: dict[str, Any] = _metadata(path).state_dict_metadata
    shapes = {name: torch.empty(e.size, dtype=e.properties.dtype, device="meta") for name, e in entries.items()}
    return join(content, shapes)


def fill(path: Path, tensors: dict[str, Tensor]) -> None:
    """Copies the numbers of a checkpoint into tensors of these names and of the same shapes, in place.

    Of a DTensor this process reads its own share alone; processes need not call this together.

    Raises:
        CheckpointError: a tensor is not there or cannot be read.
    """
    from torch.distributed.checkpoint import FileSystemReader, load  # takes half a second
    from torch.distributed.checkpoint.api import CheckpointException

    class Reader(FileSystemReader):
        def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
            return _metadata(path)

    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            load(tensors, storage_reader=Reader(path), no_dist=True)
    except CheckpointException as err:
        cause = next(iter(err.failures.values()))[0]
        raise _damaged(path, " ".join(str(cause).split())[:160]) from None


def read(path: Path) -> dict[str, Any]:
    """The checked content of a checkpoint, with whole tensors on the CPU.

    Raises:
        CheckpointError: see `verify`.
    """
    verify(path)
    plain, shapes = split(outline(path))
    tensors = {name: torch.empty_like(shape, device="cpu") for name, shape in shapes.items()}
    fill(path, tensors)
    return join(plain, tensors)
