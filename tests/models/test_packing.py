"""Rollouts of one prompt packed in one row: each attends to what it would alone."""

import pytest
import torch

from sdkit.models.packing import pack_rollouts, pad_sequences, padded_tokens, shares_rows
from sdkit.models.weights import Weights

CPU = torch.device("cpu")
PROMPTS = [(1, 2, 3), (4, 5), (1, 2, 3), (1, 2, 3)]
COMPLETIONS = [(10, 11), (12, 13, 14), (15,), (16, 17, 18, 19)]
ALL_TOKENS = [range(len(c)) for c in COMPLETIONS]


def test_equal_prompts_share_rows_up_to_the_longest():
    assert [pack.members for pack in pack_rollouts(PROMPTS, COMPLETIONS, 100)] == [(0, 2, 3), (1,)]
    assert [pack.members for pack in pack_rollouts(PROMPTS, COMPLETIONS, 6)] == [(0, 2), (1,), (3,)]
    assert [pack.members for pack in pack_rollouts(PROMPTS, COMPLETIONS, 0)] == [(0,), (1,), (2,), (3,)]


def test_padded_tokens_match_the_tensor():
    for longest in (0, 6, 100):
        batch = pad_sequences(PROMPTS, COMPLETIONS, ALL_TOKENS, longest, CPU)
        assert batch.input_ids.numel() == padded_tokens(PROMPTS, COMPLETIONS, longest)
    assert padded_tokens([], [], 100) == 0


def test_completion_attends_to_its_prompt_and_itself():
    (row,) = pad_sequences([(1, 2)] * 2, [(3, 4), (5,)], [range(2), range(1)], 100, CPU).attention_mask
    expected = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 0, 0, 1]]
    assert row[0].int().tolist() == expected


def test_mask_equals_the_rule_for_each_pair_of_tokens():
    """A token attends to the earlier tokens of its prompt and of its own completion; padding is a completion too."""
    batch = pad_sequences(PROMPTS, COMPLETIONS, ALL_TOKENS, 100, CPU)
    owners = torch.tensor([[0] * 3 + [1] * 2 + [2] + [3] * 4, [0] * 2 + [1] * 3 + [-1] * 5])
    query, key = owners[:, :, None], owners[:, None, :]
    expected = torch.ones(10, 10, dtype=torch.bool).tril() & ((query == key) | (key == 0))
    assert torch.equal(batch.attention_mask, expected[:, None])


def test_positions_continue_from_the_prompt():
    batch = pad_sequences([(1, 2)] * 2, [(3, 4), (5,)], [range(2), range(1)], 100, CPU)
    assert batch.positions is not None
    assert batch.positions.tolist() == [[0, 1, 2, 3, 2]]
    assert batch.predictor_index.tolist() == [1, 2, 1]
    assert batch.tokens == 5


@pytest.mark.parametrize("positions", [ALL_TOKENS, [[1], [0, 2], [], [3]]], ids=["all", "some"])
def test_packed_states_and_gradients_match_separate_rows(tiny_folder, positions):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    results = []
    for longest in (100, 0):
        batch = pad_sequences(PROMPTS, COMPLETIONS, positions, longest, CPU)
        hidden = Weights(model).hidden(batch)
        model.zero_grad()
        (hidden * torch.linspace(-1, 1, hidden.numel()).view_as(hidden)).sum().backward()
        results.append((hidden.detach(), [p.grad.clone() for p in model.base_model.parameters()]))
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-4)


def test_attention_without_masks_never_meets_shared_rows(tiny_folder):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    model.config._attn_implementation = "flash_attention_2"
    batch = pad_sequences(PROMPTS, COMPLETIONS, ALL_TOKENS, 100, CPU)
    with pytest.raises(ValueError, match="flash_attention_2 takes no mask"):
        Weights(model).hidden(batch)
    assert not shares_rows(Weights(model), CPU)


def test_model_that_ignores_the_mask_is_detected(tiny_folder):
    from transformers import AutoModelForCausalLM

    class Deaf(Weights):
        def hidden(self, sequences):
            with self.active() as causal:
                out = causal.base_model(input_ids=sequences.input_ids, use_cache=False)
            return out.last_hidden_state.flatten(0, 1)[sequences.predictor_index]

    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.bfloat16)
    assert shares_rows(Weights(model), CPU)
    assert not shares_rows(Deaf(model), CPU)
