"""Rollouts of one prompt in one row: each sees what it would see alone."""

import pytest
import torch

from sdkit.models.packing import pack_rollouts, pad_sequences, padded_tokens, shares_rows
from sdkit.models.weights import Weights

CPU = torch.device("cpu")
PROMPTS = [(1, 2, 3), (4, 5), (1, 2, 3), (1, 2, 3)]
COMPLETIONS = [(10, 11), (12, 13, 14), (15,), (16, 17, 18, 19)]
WHOLE = [range(len(c)) for c in COMPLETIONS]


def test_rows_are_shared_by_equal_prompts_up_to_the_longest():
    assert [pack.members for pack in pack_rollouts(PROMPTS, COMPLETIONS, 100)] == [(0, 2, 3), (1,)]
    assert [pack.members for pack in pack_rollouts(PROMPTS, COMPLETIONS, 6)] == [(0, 2), (1,), (3,)]
    assert [pack.members for pack in pack_rollouts(PROMPTS, COMPLETIONS, 0)] == [(0,), (1,), (2,), (3,)]


def test_padded_tokens_are_those_of_the_tensor():
    for longest in (0, 6, 100):
        found = pad_sequences(PROMPTS, COMPLETIONS, WHOLE, longest, CPU)
        assert found.input_ids.numel() == padded_tokens(PROMPTS, COMPLETIONS, longest)
    assert padded_tokens([], [], 100) == 0


def test_a_completion_attends_to_the_prompt_and_to_itself():
    (row,) = pad_sequences([(1, 2)] * 2, [(3, 4), (5,)], [range(2), range(1)], 100, CPU).attention_mask
    expected = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 0, 0, 1]]
    assert row[0].int().tolist() == expected


def test_a_completion_counts_from_the_end_of_its_prompt():
    found = pad_sequences([(1, 2)] * 2, [(3, 4), (5,)], [range(2), range(1)], 100, CPU)
    assert found.positions is not None
    assert found.positions.tolist() == [[0, 1, 2, 3, 2]]
    assert found.predictor_index.tolist() == [1, 2, 1]
    assert found.tokens == 5


@pytest.mark.parametrize("kept", [WHOLE, [[1], [0, 2], [], [3]]], ids=["all", "some"])
def test_states_and_gradients_are_those_of_rows_alone(tiny_folder, kept):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    found = []
    for longest in (100, 0):
        batch = pad_sequences(PROMPTS, COMPLETIONS, kept, longest, CPU)
        hidden = Weights(model).hidden(batch)
        model.zero_grad()
        (hidden * torch.linspace(-1, 1, hidden.numel()).view_as(hidden)).sum().backward()
        found.append((hidden.detach(), [p.grad.clone() for p in model.base_model.parameters()]))
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-4)


def test_a_model_that_does_not_take_the_mask_is_noticed(tiny_folder):
    from transformers import AutoModelForCausalLM

    class Deaf(Weights):
        def hidden(self, sequences):
            with self.active() as causal:
                out = causal.base_model(input_ids=sequences.input_ids, use_cache=False)
            return out.last_hidden_state.flatten(0, 1)[sequences.predictor_index]

    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.bfloat16)
    assert shares_rows(Weights(model), CPU)
    assert not shares_rows(Deaf(model), CPU)
