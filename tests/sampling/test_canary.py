"""The canary's bound is that of the precision in force: float32 kernels on GPUs round their factors to TF32."""

import pytest
import torch

from sdkit.language.specs import VllmBackend
from sdkit.sampling.canary import BFLOAT16_BOUND, FLOAT32_BOUND, TF32_BOUND, draw_canary


@pytest.mark.parametrize(
    ("capability", "dtypes", "bound"),
    [
        (None, ("float32", "float32"), FLOAT32_BOUND),
        ((7, 5), ("float32", "float32"), FLOAT32_BOUND),
        ((8, 0), ("float32", "float32"), TF32_BOUND),
        ((9, 0), ("bfloat16", "float32"), BFLOAT16_BOUND),
        ((9, 0), (None, "bfloat16"), BFLOAT16_BOUND),
    ],
)
def test_bound_follows_the_precision(monkeypatch, capability, dtypes, bound):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    engine, trainer = dtypes
    assert draw_canary(VllmBackend(dtype=engine), trainer, 512, 100).bound == bound
    assert draw_canary(VllmBackend(dtype=engine, canary_bound=0.5), trainer, 512, 100).bound == 0.5
