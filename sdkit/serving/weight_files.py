"""Weights on their way to servers: one safetensors file a version, written tensor by tensor.

Knows files; knows nothing of servers or of what samples.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
from collections.abc import Iterator
from pathlib import Path

import torch
from attrs import frozen
from torch import Tensor

from sdkit.language.errors import BadEnvironment
from sdkit.models.weights import Weights
from sdkit.serving.gateway import sha256_of

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
"""As safetensors names them."""
FACTS = 160
"""Bytes that the header has for dtype, shape and place of one tensor."""


@frozen(kw_only=True)
class WeightFile:
    """One version of the student's weights, or of a teacher's, in a file."""

    path: Path
    version: int  # optimizer steps behind it
    sha256: str
    canary: tuple[float, ...]  # the trainer's log-probabilities of the canary sequence


class WeightFolder:
    """Where this process's weight files are.  Files of processes of this machine that are gone are removed.

    The empty file `probe` shows a server whether it sees the same folder.
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
                if not _runs(old.name.lstrip(".").removeprefix(f"{host}.").split(".")[0]):
                    old.unlink(missing_ok=True)
            (path / self.probe).touch(mode=0o600)
        except OSError as error:
            raise BadEnvironment(
                f"cannot use {path} for weight files: {error.strerror}",
                path=("rollout", "backend", "folder"),
            ) from None

    def write(self, weights: Weights, version: int, canary: tuple[float, ...]) -> WeightFile:
        """Write a version of the weights; the name appears when the file is whole.  Raises BadEnvironment.

        Where weights are sharded every rank goes through `weights.tensors()`; this one writes them.
        """
        self._written += 1
        name = f"{self._owner}.{self._written:06d}.safetensors"
        partial, final = self.path / f".{name}", self.path / name
        names = [name for name, _ in weights.causal.named_parameters()]
        try:
            _write(weights.named_tensors(), sum(len(n) + FACTS for n in names), partial)
            sha256 = sha256_of(partial)
            partial.rename(final)
        except OSError as error:
            raise BadEnvironment(
                f"cannot write {final}: {error.strerror}",
                hint="make room, or name another disk in rollout.backend.folder: two versions lie there at once, with "
                "max_staleness more",
            ) from None
        finally:
            partial.unlink(missing_ok=True)
        return WeightFile(path=final, version=version, sha256=sha256, canary=canary)

    def close(self) -> None:
        """Remove what is left of this process's files."""
        with contextlib.suppress(OSError):
            for path in self.path.glob(f"{self._owner}.*"):
                path.unlink(missing_ok=True)


def _runs(pid: str) -> bool:
    """Whether a process has this number; a name that has none is left alone."""
    if not pid.isdecimal():
        return True
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _write(tensors: Iterator[tuple[str, Tensor]], room: int, path: Path) -> None:
    """A safetensors file whose header, of `room` bytes, is filled in when the last tensor is written."""
    room += -room % 8
    header: dict[str, object] = {}
    end = 0
    with path.open("wb") as file:
        os.fchmod(file.fileno(), 0o600)
        file.seek(8 + room)
        for name, tensor in tensors:
            flat = tensor.detach().contiguous().cpu().flatten()
            begin, end = end, end + flat.nbytes
            header[name] = {
                "dtype": DTYPES[flat.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [begin, end],
            }
            file.write(flat.view(torch.uint8).numpy().data)
        text = json.dumps(header, separators=(",", ":")).encode()
        if len(text) > room:
            raise RuntimeError(f"the header has {len(text)} bytes, and room for {room}")
        file.seek(0)
        file.write(room.to_bytes(8, "little") + text.ljust(room))
