"""Attention on a CPU equals transformers' own in value, and in gradient except where that of bfloat16 is rough."""

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from sdkit.models import attention

ROWS, HEADS, GROUPS, WIDTH = 2, 6, 2, 8


class Layer:
    num_key_value_groups = HEADS // GROUPS
    is_causal = True


def inputs(tokens, cached, groups=GROUPS, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)

    def draw(heads, length):
        states = torch.randn(ROWS, heads, length, WIDTH, generator=generator)
        return states.to(dtype).requires_grad_()

    mask = torch.ones(tokens, cached, dtype=torch.bool).tril(cached - tokens).repeat(ROWS, 1, 1, 1)
    mask[0, :, :, 0] = False
    return (draw(HEADS, tokens), draw(groups, cached), draw(groups, cached)), mask


def results(function, tensors, mask):
    states, weights = function(Layer(), *tensors, mask, scaling=0.3)
    assert weights is None
    return states, torch.autograd.grad(states.sin().sum(), tensors)


@pytest.mark.parametrize(("tokens", "cached"), [(1, 9), (4, 9), (5, 5)])
def test_masked_attention_equals_transformers(tokens, cached):
    tensors, mask = inputs(tokens, cached)
    mask[..., -1] = True  # every token attends to one at least
    states, gradients = results(attention.cpu_sdpa, tensors, mask)
    expected, expected_gradients = results(sdpa_attention_forward, tensors, mask)
    torch.testing.assert_close(states, expected, atol=1e-6, rtol=1e-5)
    for gradient, other in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, other, atol=1e-6, rtol=1e-5)


def test_grouped_keys_are_not_repeated(monkeypatch):
    def refuse(*_args):
        raise AssertionError("keys are repeated")

    monkeypatch.setattr("transformers.integrations.sdpa_attention.repeat_kv", refuse)
    tensors, mask = inputs(1, 9)
    attention.cpu_sdpa(Layer(), *tensors, mask)
    attention.cpu_sdpa(Layer(), *tensors, None)
    with pytest.raises(AssertionError, match="repeated"):
        sdpa_attention_forward(Layer(), *tensors, mask)


@pytest.mark.parametrize("masked", [False, True])
def test_gradient_in_bfloat16_is_that_of_float32(masked):
    tensors, mask = inputs(100, 100, dtype=torch.bfloat16)
    mask = mask | torch.eye(100, dtype=torch.bool) if masked else None
    states, gradients = results(attention.cpu_sdpa, tensors, mask)
    kernel_states, kernel_gradients = results(sdpa_attention_forward, tensors, mask)
    assert torch.equal(states, kernel_states)
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    _, expected = results(sdpa_attention_forward, exact, mask)
    for gradient, kernel, right in zip(gradients, kernel_gradients, expected, strict=True):
        assert gradient.dtype == torch.bfloat16
        error, largest = (gradient - right).abs().max(), right.abs().max()
        assert error < torch.finfo(torch.bfloat16).eps * largest
        assert error <= (kernel - right).abs().max()


@pytest.mark.parametrize(
    ("tokens", "dtype", "options"),
    [(100, torch.float32, {}), (attention.SHORT + 1, torch.bfloat16, {}), (100, torch.bfloat16, {"dropout": 0.1})],
)
def test_other_gradients_are_torchs(tokens, dtype, options):
    """Long rows, whose kernel is fast; float32; dropout, which a second pass would draw anew."""
    tensors, _ = inputs(tokens, tokens, groups=HEADS, dtype=dtype)
    states, _ = attention.cpu_sdpa(Layer(), *tensors, None, **options)
    assert "Float32Gradient" not in type(states.grad_fn).__name__
    with torch.no_grad():
        assert attention.cpu_sdpa(Layer(), *tensors, None, **options)[0].grad_fn is None


def test_loaded_models_use_it(tiny_folder):
    from transformers import AttentionInterface

    from sdkit.language.specs import ModelSpec
    from sdkit.models.loading import load_model

    load_model(ModelSpec(path=str(tiny_folder), dtype="float32"), str(tiny_folder), 0)
    assert AttentionInterface()["sdpa"] is attention.cpu_sdpa
