"""A prefix that all rows share, in a pass of its own: the states after it are those of one pass."""

import families
import pytest
import torch
from attrs import evolve
from tinyruns import LORA, advance, make_spec, model
from transformers import AutoModelForCausalLM

from sdkit.batches import PrefixGroup
from sdkit.models import activation_checkpointing, prefix
from sdkit.models.logit_transform import decoder
from sdkit.models.packing import pad_sequences, sees_ahead
from sdkit.models.prefix import PrefixCache, group_by_prefix, states_by_group
from sdkit.models.weights import Sharding, Weights
from sdkit.train.row_probe import longest_shared, takes_prefix

CPU = torch.device("cpu")
LONG, TEXT = 300, 150  # tokens of a shared row, of the longest text in it
RECURRENT = ("falcon_h1",)
PREFIX = tuple(range(2, 82))
"""Longer than the attention chunks of any family."""
PROMPTS = [(*PREFIX, *rest) for rest in [(90, 91, 92), (90, 93), (90, 91, 92), (94,)]]
COMPLETIONS = [(10, 11), (12, 13, 14), (15,), (16, 17, 18, 19)]
WANTED = [range(2), range(3), [], [0, 3]]


def build(folder, family, dtype=torch.float32):
    located = families.build(folder, family)
    attention = "eager" if family in families.EAGER else "sdpa"
    return Weights(AutoModelForCausalLM.from_pretrained(located, dtype=dtype, attn_implementation=attention).eval())


def batch(longest=0):
    """The rows in one group, with a prefix, whether it pays or not."""
    sequences = pad_sequences(PROMPTS, COMPLETIONS, WANTED, longest, CPU)
    rows, width = sequences.input_ids.shape
    return evolve(sequences, prefix_groups=(PrefixGroup(start=0, end=rows, prefix=len(PREFIX), width=width),))


def apart(weights, sequences):
    with torch.no_grad(), weights.active() as causal:
        return states_by_group(decoder(causal), sequences)


def groups_of(*prompts, own=1):
    """Start, end and prefix of each group of rows that have `own` tokens after their prompts."""
    groups = group_by_prefix(prompts, [len(prompt) + own for prompt in prompts])
    return [(group.start, group.end, group.prefix) for group in groups]


def test_prefix_leaves_every_prompt_a_token(monkeypatch):
    monkeypatch.setattr(prefix, "LEAST_SAVED", 1)
    assert groups_of((1, 2, 3, 4), (1, 2, 5), (1, 2, 3)) == [(0, 3, 2)]
    assert groups_of((1, 2), (1, 2, 3)) == [(0, 2, 1)]
    assert groups_of((1, 2), (3, 2)) == [(0, 2, 0)]
    assert groups_of((1, 2, 3)) == [(0, 1, 0)]
    assert pad_sequences([], [], [], 0, CPU).prefix_groups == (PrefixGroup(start=0, end=1, prefix=0, width=1),)


def test_prefix_runs_apart_only_where_it_pays(monkeypatch):
    """Four rows save three times their prefix of 80 tokens."""
    monkeypatch.setattr(prefix, "LEAST_SAVED", 3 * len(PREFIX))
    assert groups_of(*PROMPTS) == [(0, 4, len(PREFIX))]
    monkeypatch.setattr(prefix, "LEAST_SAVED", 3 * len(PREFIX) + 1)
    assert groups_of(*PROMPTS) == [(0, 4, 0)]
    monkeypatch.setattr(prefix, "LEAST_SAVED", 3 * len(PREFIX))
    assert groups_of(*PROMPTS, own=3 * 20 * len(PREFIX)) == [(0, 4, 0)]


def test_rows_are_grouped_by_prompts_that_share_more():
    """Two prompts in three copies each, with a common start: a prefix for each prompt saves more than one for both."""
    head, a, b = tuple(range(50)), (*range(100, 500),), (*range(500, 900),)
    prompts = [(*head, *text, end) for text in (a, b) for end in range(3)]
    assert groups_of(*prompts) == [(0, 3, 450), (3, 6, 450)]
    assert groups_of(*[p[-60:] for p in prompts]) == [(0, 6, 0)]  # too short to pay for two passes each
    assert groups_of(*prompts[:3], *prompts[3:4]) == [(0, 3, 450), (3, 4, 0)]


def test_states_of_several_groups_equal_those_of_one_pass(tiny_folder):
    weights = Weights(AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).eval())
    sequences = pad_sequences(PROMPTS, COMPLETIONS, WANTED, 0, CPU)
    groups = (
        PrefixGroup(start=0, end=1, prefix=0, width=85),
        PrefixGroup(start=1, end=3, prefix=80, width=85),
        PrefixGroup(start=3, end=4, prefix=0, width=85),
    )
    actual = apart(weights, evolve(sequences, prefix_groups=groups))
    torch.testing.assert_close(actual, weights.hidden(sequences).detach(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", families.SETTINGS)
def test_padding_on_the_right_needs_no_mask(tmp_path, family):
    weights, sequences = build(tmp_path, family), batch()
    lengths = torch.tensor([len(p) + len(c) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)])
    mask = (torch.arange(sequences.input_ids.shape[1]) < lengths[:, None]).long()
    with torch.no_grad():
        torch.testing.assert_close(
            weights.hidden(sequences), weights.hidden(evolve(sequences, attention_mask=mask)), atol=1e-5, rtol=1e-4
        )
    assert not sees_ahead(weights, CPU)


@pytest.mark.parametrize("family", families.SETTINGS)
def test_states_after_prefix_equal_those_of_one_pass(tmp_path, family):
    weights = build(tmp_path, family)
    longest = longest_shared(weights, CPU, LONG, TEXT)
    assert takes_prefix(weights, CPU, TEXT, longest) == (family not in RECURRENT)
    if family in RECURRENT:
        return
    for sequences in (batch(), batch(longest)):
        with torch.no_grad():
            expected = weights.hidden(sequences)
        torch.testing.assert_close(apart(weights, sequences), expected, atol=2e-5, rtol=1e-4)


def test_rows_may_share_prompts_after_the_prefix(tiny_folder):
    weights = Weights(AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).eval())
    shared = batch(LONG)
    assert shared.attention_mask is not None
    with torch.no_grad():
        torch.testing.assert_close(apart(weights, shared), weights.hidden(batch()), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("longest", [0, LONG])
def test_gradients_flow_through_the_prefix(tiny_folder, checkpointing, longest):
    weights = Weights(AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).eval())
    if checkpointing:
        activation_checkpointing.enable(weights.model)
    sequences = batch(longest)

    def gradients_of(hidden):
        (hidden * torch.arange(hidden.numel()).view_as(hidden).sin()).sum().backward()
        gradients = {name: p.grad for name, p in weights.model.named_parameters() if p.grad is not None}
        weights.model.zero_grad(set_to_none=True)
        return gradients

    expected = gradients_of(weights.hidden(sequences))
    with weights.active() as causal:
        actual = gradients_of(states_by_group(decoder(causal), sequences))
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, atol=1e-5, rtol=1e-3, msg=name)


def misplace(layer, values):
    """The prefix's keys stand one place late."""
    layer.keys = layer.keys.roll(1, dims=-2)
    return values


def see_ahead(layer, values):
    """The next token leaks into each value."""
    return values + 0.1 * values.roll(-1, dims=-2)


def see_others(layer, values):
    """So does the last token of the row, which may belong to another completion."""
    return values + 0.1 * values[:, :, -1:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fault", [misplace, see_ahead, see_others])
def test_cache_that_changes_states_is_detected(tiny_folder, monkeypatch, dtype, fault):
    weights = Weights(AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=dtype).eval())
    assert takes_prefix(weights, CPU, TEXT, LONG)
    update = PrefixCache.update

    def faulty(self, key_states, value_states, layer_idx, *args, **kwargs):
        if self.frozen:
            value_states = fault(self.layers[layer_idx], value_states)
        return update(self, key_states, value_states, layer_idx, *args, **kwargs)

    monkeypatch.setattr(PrefixCache, "update", faulty)
    assert not takes_prefix(weights, CPU, TEXT, LONG)


def test_model_that_sees_later_tokens_is_detected(tiny_folder):
    weights = Weights(AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.bfloat16).eval())
    assert not sees_ahead(weights, CPU)
    for layer in weights.causal.model.layers:
        layer.register_forward_hook(lambda _module, _args, out: out + 0.02 * out.roll(-1, dims=1))
    assert sees_ahead(weights, CPU)


def test_prefix_runs_apart_only_if_the_model_takes_it(tiny_folder):
    weights = Weights(AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).eval())
    rows = []
    weights.causal.model.register_forward_pre_hook(
        lambda _module, _args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )

    def rows_of_passes():
        rows.clear()
        weights.hidden(batch())
        return list(rows)

    assert rows_of_passes() == [4]
    weights.takes_prefix = True
    assert rows_of_passes() == [1, 4]
    weights.sharding = Sharding()
    weights.sharding.in_step = True  # as under stage 3: all ranks must run equally many passes
    assert rows_of_passes() == [4]


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "adapters"])
def test_training_is_equal_with_and_without(open_tiny, tiny_folder, monkeypatch, lora):
    counts = []
    count = prefix.states_by_group
    monkeypatch.setattr("sdkit.models.weights.states_by_group", lambda *args: counts.append(args) or count(*args))
    monkeypatch.setattr(prefix, "LEAST_SHARE", 0)
    results = []
    for least in (10**9, 1):
        monkeypatch.setattr(prefix, "LEAST_SAVED", least)
        trainer = open_tiny(make_spec(tiny_folder, model=model(tiny_folder, lora=lora)))
        assert trainer.models.student.takes_prefix
        results.append([step.metrics for step in advance(trainer, 2)])
        assert bool(counts) == (least == 1)
    for plain, shared in zip(*results, strict=True):
        assert shared == pytest.approx(plain, rel=1e-4, abs=1e-6)
