"""Masked attention over grouped keys equals transformers' own, in value and gradient."""

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from sdkit.models import attention

ROWS, HEADS, GROUPS, WIDTH = 2, 6, 2, 8


class Layer:
    num_key_value_groups = HEADS // GROUPS
    is_causal = True


def inputs(tokens, cached, groups=GROUPS):
    generator = torch.Generator().manual_seed(0)

    def draw(heads, length):
        return torch.randn(ROWS, heads, length, WIDTH, generator=generator, requires_grad=True)

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
    states, gradients = results(attention.grouped_sdpa, tensors, mask)
    expected, expected_gradients = results(sdpa_attention_forward, tensors, mask)
    torch.testing.assert_close(states, expected, atol=1e-6, rtol=1e-5)
    for gradient, other in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, other, atol=1e-6, rtol=1e-5)


def test_grouped_keys_are_not_repeated(monkeypatch):
    def refuse(*_args):
        raise AssertionError("keys are repeated")

    monkeypatch.setattr("transformers.integrations.sdpa_attention.repeat_kv", refuse)
    tensors, mask = inputs(1, 9)
    attention.grouped_sdpa(Layer(), *tensors, mask)
    attention.grouped_sdpa(Layer(), *tensors, None)
    with pytest.raises(AssertionError, match="repeated"):
        sdpa_attention_forward(Layer(), *tensors, mask)


def test_loaded_models_use_it(tiny_folder):
    from transformers import AttentionInterface

    from sdkit.language.specs import ModelSpec
    from sdkit.models.loading import load_model

    load_model(ModelSpec(path=str(tiny_folder), dtype="float32"), str(tiny_folder), 0)
    assert AttentionInterface()["sdpa"] is attention.grouped_sdpa
