"""Weight files for rollout servers: one safetensors file per version, written tensor by tensor.

Knows files; knows nothing of servers or sampling.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch
from attrs import frozen
from torch import Tensor

from sdkit.language.errors import BadEnvironment
from sdkit.language.files import sha256_of
from sdkit.models.weights import Weights

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
"""Dtypes by their safetensors names."""
HEADER_BYTES_PER_TENSOR = 160
"""Bytes reserved in the header for the dtype, shape and offsets of one tensor."""


@frozen(kw_only=True)
class WeightFile:
    """A file with one version of the student's or a teacher's weights."""

    path: Path
    version: int  # optimizer steps
    sha256: str
    canary: tuple[float, ...]  # the trainer's log-probabilities of the canary sequence


class WeightFolder:
    """The folder for this process's weight files.  Files left by dead processes of this machine are removed.

    A server checks for the empty file `probe` to learn whether it sees the same folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        host = socket.gethostname()
        self._owner = f"{host}.{os.getpid()}.{secrets.token_hex(4)}"
        self.probe = f"{self._owner}.probe"
        self._written = 0
        try:
            path.mkdir(parents=True, exist_ok=True, mode=0o700)
            for old in [*path.glob(f"{host}.*"), *path.glob(f".{host}.*")]:
                pid = old.name.lstrip(".").removeprefix(f"{host}.").split(".")[0]
                if pid.isdecimal() and not psutil.pid_exists(int(pid)):
                    old.unlink(missing_ok=True)
            (path / self.probe).touch(mode=0o600)
        except OSError as error:
            raise BadEnvironment(
                f"cannot use {path} for weight files: {error.strerror}", path=("rollout", "backend", "folder")
            ) from None

    def write(self, weights: Weights, version: int, canary: tuple[float, ...]) -> WeightFile:
        """Write a version of the weights.  The file gets its name once it is complete.  Raises BadEnvironment.

        If the weights are sharded, every rank must iterate `weights.named_tensors()`; only this rank writes.
        """
        self._written += 1
        name = f"{self._owner}.{self._written:06d}.safetensors"
        partial, final = self.path / f".{name}", self.path / name
        names = [name for name, _ in weights.causal.named_parameters()]
        try:
            _write(weights.named_tensors(), sum(len(n) + HEADER_BYTES_PER_TENSOR for n in names), partial)
            sha256 = sha256_of(partial)
            partial.rename(final)
        except OSError as error:
            raise BadEnvironment(
                f"cannot write {final}: {error.strerror}",
                hint="free some space, or set rollout.backend.folder to another disk: it holds two versions at once, more "
                "with max_staleness",
            ) from None
        finally:
            partial.unlink(missing_ok=True)
        return WeightFile(path=final, version=version, sha256=sha256, canary=canary)

    def close(self) -> None:
        """Remove this process's files."""
        with contextlib.suppress(OSError):
            for path in self.path.glob(f"{self._owner}.*"):
                path.unlink(missing_ok=True)


def _write(tensors: Iterator[tuple[str, Tensor]], header_bytes: int, path: Path) -> None:
    """Write a safetensors file; its header of `header_bytes` bytes is filled in after the last tensor."""
    header_bytes += -header_bytes % 8
    header: dict[str, object] = {}
    end = 0
    with path.open("wb") as file:
        os.fchmod(file.fileno(), 0o600)
        file.seek(8 + header_bytes)
        for name, tensor in tensors:
            flat = tensor.detach().contiguous().cpu().flatten()
            begin, end = end, end + flat.nbytes
            header[name] = {"dtype": DTYPES[flat.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
            file.write(flat.view(torch.uint8).numpy().data)
        text = json.dumps(header, separators=(",", ":")).encode()
        if len(text) > header_bytes:
            raise RuntimeError(f"the header needs {len(text)} bytes, but {header_bytes} are reserved")
        file.seek(0)
        file.write(header_bytes.to_bytes(8, "little") + text.ljust(header_bytes))
