"""Activation checkpointing recomputes every block and changes no result; a model draws no random numbers."""

from functools import partial

import families
import pytest
import torch
from attrs import evolve
from tinyruns import LORA, advance, make_spec, masters, model, rollouts_of, teacher, training

from sdkit.language.errors import BadData
from sdkit.language.specs import EmaWeights
from sdkit.models import activation_checkpointing, probes
from sdkit.models.loading import load_model
from sdkit.models.weights import Weights

CPU = torch.device("cpu")
DROPOUTS = ["llama", "gpt2", "opt", "bloom", "falcon", "mixtral", "phimoe"]


def open_weights(folder, family, *, checkpointing=False, lora=None):
    attention = "eager" if family in families.EAGER else "sdpa"
    spec = evolve(model(folder, lora=lora), attn_implementation=attention)
    spec = evolve(spec, activation_checkpointing=checkpointing)
    return Weights(load_model(spec, str(folder), 5))


def recomputed_forwards(weights):
    forwards = [module.forward for module in weights.causal.modules()]
    return [f for f in forwards if isinstance(f, activation_checkpointing.RecomputedForward)]


def gradients(weights):
    """Hidden states, and the gradients of a fixed function of them."""
    hidden = weights.hidden(probes.probe_sequence(weights, CPU))
    hidden.square().sum().backward()
    return hidden.detach(), {n: p.grad for n, p in weights.causal.named_parameters()}


@pytest.mark.parametrize("family", DROPOUTS)
def test_recomputing_is_bitwise_equal_without_dropout(family, tmp_path):
    folder = families.build(tmp_path / family, family)
    lora = None if family == "phimoe" else LORA
    for adapters in (None, lora):
        plain = open_weights(folder, family, lora=adapters)
        checkpointed = open_weights(folder, family, lora=adapters, checkpointing=True)
        hidden, expected = gradients(plain)
        recomputed, actual = gradients(checkpointed)
        assert torch.equal(hidden, recomputed)
        assert torch.equal(hidden, plain.hidden(probes.probe_sequence(plain, CPU)))
        for name, gradient in expected.items():
            assert (gradient is None) == (actual[name] is None), name
            assert gradient is None or torch.equal(gradient, actual[name]), name
        assert [forward.runs for forward in recomputed_forwards(checkpointed)] == [2, 2]
        assert not any(module.training for module in checkpointed.model.modules())
        probes.check_deterministic(checkpointed, "student", CPU)
        activation_checkpointing.check(checkpointed, family, CPU)


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_training_is_equal_and_recomputes_every_block(open_tiny, tiny_folder, stage, lora):
    runs = []
    for checkpointing in (False, True):
        trainer = open_tiny(
            make_spec(
                tiny_folder,
                model=evolve(model(tiny_folder, lora=lora), activation_checkpointing=checkpointing),
                training=training(zero_stage=stage),
                teacher=teacher(EmaWeights(update_rate=0.1)),
            )
        )
        batch = rollouts_of(trainer)
        before = [forward.runs for forward in recomputed_forwards(trainer.models.student)]
        norms = [item.metrics["grad_norm"] for item in advance(trainer, 2)]
        after = [forward.runs for forward in recomputed_forwards(trainer.models.student)]
        runs.append(([item.completion_ids for item in batch.rollouts], norms, masters(trainer)))
        assert len(after) == (2 if checkpointing else 0)
        assert all(last > first for first, last in zip(before, after, strict=True))
        assert not any(module.training for module in trainer.models.student.model.modules())
    (ids, norms, plain), (other_ids, other_norms, recomputed) = runs
    assert (ids, norms) == (other_ids, other_norms)
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)


def test_model_whose_blocks_are_not_recomputed_is_refused(tmp_path):
    folder = families.build(tmp_path / "llama", "llama")
    weights = open_weights(folder, "llama", checkpointing=True)
    for forward in recomputed_forwards(weights):
        forward.__class__ = type(
            "Plain",
            (activation_checkpointing.RecomputedForward,),
            {"__call__": activation_checkpointing.RecomputedForward._run},
        )
    with pytest.raises(BadData, match="0 of 2 blocks are recomputed") as refusal:
        activation_checkpointing.check(weights, "it", CPU)
    assert refusal.value.path == ("model", "activation_checkpointing")


def test_model_whose_recomputation_differs_is_refused(tmp_path):
    folder = families.build(tmp_path / "llama", "llama")
    weights = open_weights(folder, "llama", checkpointing=True)
    forward = recomputed_forwards(weights)[1]
    calls = []

    def alternate(run, hidden, **kwargs):
        calls.append(1)
        return run(hidden * (1 + len(calls) % 2), **kwargs)

    forward.forward = partial(alternate, forward.forward)
    with pytest.raises(BadData, match="cannot checkpoint its activations: its"):
        activation_checkpointing.check(weights, "it", CPU)


def test_model_that_draws_random_numbers_in_eval_mode_is_refused(tmp_path):
    folder = families.build(tmp_path / "llama", "llama")
    weights = open_weights(folder, "llama")
    layer = weights.causal.model.layers[0].mlp
    layer.register_forward_hook(lambda m, args, out: torch.nn.functional.dropout(out, 0.1))
    with pytest.raises(BadData, match="draws random numbers in eval mode"):
        probes.check_deterministic(weights, "student", CPU)
