"""The allocated cache and products of few rows sample what plain `generate` samples."""

import families
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from sdkit.batches import SamplingParams, SamplingRequest
from sdkit.models.logit_transform import decoder
from sdkit.models.weights import Weights
from sdkit.sampling import few_rows
from sdkit.sampling.prefill import allocate_cache
from sdkit.sampling.transformers import TransformersRollouts

PREFIX = tuple(range(2, 72))
PROMPTS = [(*PREFIX, *rest) for rest in [(90, 91, 92), (90, 93), (94,), ()]] + [(*PREFIX[:5], 95)]
"""Of unequal lengths; one is the start of others, one shares five tokens and is shorter than the prefix."""
SAMPLING = SamplingParams(max_new_tokens=6, temperature=1.0, top_p=1.0, top_k=0)


def build(folder, family):
    located = families.build(folder, family)
    attention = "eager" if family in families.EAGER else "sdpa"
    return AutoModelForCausalLM.from_pretrained(located, dtype=torch.float32, attn_implementation=attention).eval()


def sample(model, *, takes_prefix, prompts=PROMPTS):
    weights = Weights(model)
    weights.takes_prefix = takes_prefix
    backend = TransformersRollouts(tokenizer=None, batch_size=8, end_ids=(1,))
    backend.load(weights, 0)
    return backend.sample([SamplingRequest(prompt_ids=p, seed=i) for i, p in enumerate(prompts)], SAMPLING)


def assert_equal(actual, expected):
    assert [c.ids for c in actual] == [c.ids for c in expected]
    for one, other in zip(actual, expected, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


@pytest.mark.parametrize(
    "prompts", [PROMPTS, PROMPTS[:4], [(*PREFIX, 90), (*PREFIX, 91)]], ids=["short", "long", "equal"]
)
@pytest.mark.parametrize("family", families.SETTINGS)
def test_samples_are_those_without_a_shared_prefix(tmp_path, monkeypatch, family, prompts):
    monkeypatch.setattr("sdkit.sampling.prefill.LEAST_SAVED", 1)
    model = build(tmp_path, family)
    assert_equal(sample(model, takes_prefix=True, prompts=prompts), sample(model, takes_prefix=False, prompts=prompts))


@pytest.mark.parametrize(("prompts", "filled"), [(PROMPTS, 5), (PROMPTS[:4], len(PREFIX)), ([PREFIX] * 3, 69)])
def test_prefix_fills_the_columns_before_the_first_difference(tiny_folder, monkeypatch, prompts, filled):
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).eval()
    monkeypatch.setattr("sdkit.sampling.prefill.LEAST_SAVED", filled * (len(prompts) - 1))
    with torch.no_grad():
        assert allocate_cache(decoder(model), prompts, 4).get_seq_length() == filled
        monkeypatch.setattr("sdkit.sampling.prefill.LEAST_SAVED", filled * (len(prompts) - 1) + 1)
        assert allocate_cache(decoder(model), prompts, 4).get_seq_length() == 0


@pytest.mark.parametrize("family", ["falcon_h1", "llama4_text"])
def test_caches_of_other_kinds_are_left_to_the_model(tmp_path, family):
    """A recurrent state, and an attention chunk."""
    assert allocate_cache(decoder(build(tmp_path, family)), PROMPTS, 4) is None


def test_cache_memory_is_allocated_once(tiny_folder):
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).eval()
    cache = allocate_cache(decoder(model), [(3, 4)], 5)
    places = set()
    with torch.no_grad():
        for tokens in ([[3, 4]], [[5]], [[6]]):
            decoder(model)(input_ids=torch.tensor(tokens), past_key_values=cache, use_cache=True)
            places.add(cache.layers[0].keys.data_ptr())
    assert cache.get_seq_length() == 4
    assert len(places) == 1


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 16, few_rows.MOST_ROWS + 1])
def test_product_of_few_rows_equals_a_linear_layer(bias, rows):
    layer = nn.Linear(48, 24, bias=bias)
    states = torch.randn(rows, 1, 48, generator=torch.Generator().manual_seed(0))
    expected = layer(states)
    with few_rows.few_rows_are_columns(layer):
        actual = layer(states)
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-5)
    assert actual.is_contiguous()
    assert "forward" not in vars(layer)


def test_layers_are_themselves_again_after_an_error():
    layer = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="stop"), few_rows.few_rows_are_columns(layer):
        raise ValueError("stop")
    assert "forward" not in vars(layer)
