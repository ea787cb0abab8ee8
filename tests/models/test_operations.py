"""The operations of a forward pass are those that torch counts, each shared prompt once."""

import math

import pytest
import torch
from tinyruns import LORA
from torch.utils.flop_counter import FlopCounterMode

from sdkit.batches import UnpaddedSequence
from sdkit.language.model_shapes import shape_at
from sdkit.models.loading import load_model
from sdkit.models.operations import model_shape, pass_operations
from sdkit.models.weights import Weights
from sdkit.plan.operations import forward_operations


@pytest.fixture
def weights(tiny_folder):
    from transformers import AutoModelForCausalLM

    return Weights(AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32, attn_implementation="eager"))


def text(prompt, completion, scored=1):
    return UnpaddedSequence(prompt=tuple(range(prompt)), completion=(7,) * completion, positions=tuple(range(scored)))


def test_a_forward_pass_has_the_operations_that_torch_counts(weights):
    """Eager attention computes the half above the diagonal as well: as much as causal attention of twice the length."""
    length = 96
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        weights.causal(torch.zeros(1, length, dtype=torch.long), use_cache=False)
    counted = counter.get_total_flops()
    assert forward_operations(model_shape(weights), length, 2 * length, length) == pytest.approx(counted, rel=0.01)


def test_a_prompt_and_its_completion_are_one_sequence(weights):
    whole = forward_operations(model_shape(weights), 30, 30, 5)
    assert pass_operations(weights, [text(10, 20, scored=5)]) == pytest.approx(whole)


def test_texts_of_one_prompt_share_it(weights):
    prompt, both = (pass_operations(weights, texts) for texts in ([text(10, 0, 0)], [text(10, 4), text(10, 4)]))
    assert both == pytest.approx(2 * pass_operations(weights, [text(10, 4)]) - prompt)


def test_shape_counts_no_adapters_and_no_embeddings_of_their_own(weights, tiny_folder):
    from tinyruns import model
    from transformers import LlamaForCausalLM

    tied = shape_at(str(tiny_folder), tiny_folder)
    assert model_shape(weights).parameters == tied.parameters
    assert (
        model_shape(Weights(load_model(model(tiny_folder, lora=LORA), str(tiny_folder), 0))).parameters
        == tied.parameters
    )
    weights.causal.config.tie_word_embeddings = False
    untied = Weights(LlamaForCausalLM(weights.causal.config))
    assert model_shape(untied).parameters == tied.parameters


class Experts:
    """A model that is only its configuration."""

    def __init__(self, config):
        self.config = config


def test_operations_of_experts_are_not_known(weights):
    config = weights.causal.config
    config.num_local_experts = 8
    weights.causal = Experts(config)
    assert math.isnan(pass_operations(weights, [text(1, 1)]))
