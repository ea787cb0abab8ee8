"""Frozen models in host memory: on the device during a use only, and with the same numbers."""

import torch
from tinyruns import advance, assert_equal, distil, make_spec, masters, rollouts_of, teacher, training

from sdkit.language.specs import EmaWeights, ExternalWeights, FrozenWeights, ReferenceKl, RoutedWeights, Table
from sdkit.models.offloading import HostParameters
from sdkit.sampling.canary import Canary

EMA, FROZEN = EmaWeights(update_rate=0.5), FrozenWeights()
TERMS = Table({**distil(), "near": ReferenceKl(estimator="vocabulary", coefficient=0.5)})


def spec_of(folder, weights=FROZEN, offload=("frozen_models",)):
    return make_spec(folder, teacher=teacher(weights), losses=TERMS, training=training(offload=offload))


def test_offloading_changes_no_number(open_tiny, tiny_folder):
    results = []
    for offload in ((), ("frozen_models",)):
        trainer = open_tiny(spec_of(tiny_folder, offload=offload))
        results.append(([step.metrics["loss"] for step in advance(trainer)], masters(trainer)))
    assert results[0][0] == results[1][0]
    for name, value in results[0][1].items():
        assert_equal(results[1][1][name], value)


def test_parameters_are_copied_for_each_use_only(open_tiny, tiny_folder):
    trainer = open_tiny(spec_of(tiny_folder))
    weights = trainer.models.teacher.weights
    host = {name: p.data_ptr() for name, p in weights.model.named_parameters()}
    used = []

    def record(module, args):
        used.append({name: p.data_ptr() for name, p in weights.model.named_parameters()})

    with weights.causal.get_input_embeddings().register_forward_pre_hook(record):
        advance(trainer, 1)
    assert used
    assert all(pointers[name] != host[name] for pointers in used for name in host)
    assert {name: p.data_ptr() for name, p in weights.model.named_parameters()} == host


def test_only_models_with_fixed_weights_are_offloaded(open_tiny, tiny_folder, other_folder):
    external = ExternalWeights(path=str(other_folder), dtype="float32")
    routes = RoutedWeights(by="answer", routes=Table({str(2 * i): w for i, w in enumerate((external, *[EMA] * 5))}))
    trainer = open_tiny(spec_of(tiny_folder, routes))
    offloaded = {
        model for model, weights in trainer.models.others.items() if isinstance(weights.sharding, HostParameters)
    }
    leaves = trainer.models.teacher.leaves
    assert offloaded == {leaves[0].weights.model, trainer.models.reference.weights.model}
    assert leaves[1].weights.model in trainer.models.others
    assert all(torch.isfinite(torch.tensor(step.metrics["loss"])) for step in advance(trainer, 2))


def test_sampler_and_canary_use_the_copy(open_tiny, tiny_folder):
    trainer = open_tiny(spec_of(tiny_folder))
    plain = open_tiny(spec_of(tiny_folder, offload=()))
    canary = Canary(ids=(3, 5, 8, 13), bound=1.0)
    assert canary.logprobs(trainer.models.teacher.weights) == canary.logprobs(plain.models.teacher.weights)
    tensors = dict(plain.models.teacher.weights.named_tensors())
    for name, tensor in trainer.models.teacher.weights.named_tensors():
        assert_equal(tensor, tensors[name])
    assert len(rollouts_of(trainer)) == 4
