"""Models with fixed weights whose parameters stay in host memory and are on the device only while they are used."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sdkit.models.weights import Sharding


class HostParameters(Sharding):
    """Copies parameters to the device for a forward pass or for reading; buffers stay on the device.

    Writes would be lost, so this is for models that never change.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._model = model
        self._device = device
        for parameter in model.parameters():
            host = parameter.data.cpu()
            parameter.data = host.pin_memory() if device.type == "cuda" else host

    def run_forward(self, function: Callable[..., Any], *args: Any) -> Any:
        with self.gather(list(self._model.parameters())):
            return function(*args)

    @contextlib.contextmanager
    def gather(self, parameters: Sequence[Tensor]) -> Iterator[None]:
        in_host_memory = [(parameter, parameter.data) for parameter in parameters]
        try:
            for parameter, host in in_host_memory:
                parameter.data = host.to(self._device, non_blocking=True, copy=True)
            yield
        finally:
            for parameter, host in in_host_memory:
                parameter.data = host

    def device_of(self, parameter: Tensor) -> torch.device:
        return self._device
