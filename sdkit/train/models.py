"""Opens the models of a run: the student, its teacher, and the models that a loss term or a blend needs beside them."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from attrs import frozen
from torch import nn

from sdkit.distributed import zero_loading
from sdkit.language import specs
from sdkit.language.errors import blaming
from sdkit.models.device import rank_device
from sdkit.models.loading import check_unquantized, end_ids, load_model, read_weights, resolve_model, special_ids
from sdkit.models.logit_transform import check_parts
from sdkit.models.offloading import HostParameters
from sdkit.models.teachers import Teacher, open_teacher
from sdkit.models.weights import Weights
from sdkit.serving.teacher_client import ServedModel
from sdkit.train.model_checks import NamedModels, check_models, compared_vocabulary, probe_models
from sdkit.train.row_probe import may_pad_samples, measure_longest_pack, takes_prefix
from sdkit.train.setup import RunSetup

SHARDED = 3
"""The ZeRO stage that shards the weights."""


@frozen(eq=False, kw_only=True)
class Models:
    """The models of a run and what was measured of them.  The set is fixed; training changes the weights in place."""

    student: Weights
    teacher: Teacher | None
    reference: Teacher | None  # the frozen start model
    blend_partner: Teacher | None  # the model that the teacher is blended with
    others: Mapping[nn.Module, Weights]  # the weights of every module other than the student's
    device: torch.device
    end_ids: tuple[int, ...]
    special_ids: frozenset[int]
    compared_ids: int  # number of token ids whose logits are compared
    ids_below: int | None  # bound of the ids that may be sampled; None: all
    longest_pack: int  # tokens of the longest row that completions may share; 0: they share none
    pads_samples: bool  # whether the transformers backend may pad prompts to equal lengths

    @property
    def teacher_weights(self) -> Weights:
        """The teacher's weights, or the student's if there is no teacher.

        The teacher must be one model in this process, neither routed nor served.
        """
        weights = self.teacher.weights if self.teacher else self.student
        assert weights is not None, "a routed or served teacher does not sample"
        return weights


def open_models(setup: RunSetup, served: Mapping[specs.ServedWeights, ServedModel]) -> Models:
    """Load and check the models; under ZeRO stage 3, shard them.  Call before DeepSpeed wraps the student.

    Raises BadData naming the key to change.
    """
    spec = setup.spec
    device = rank_device()
    with blaming("model", "path"):
        check_unquantized(spec.model, setup.model_folder)
        student = _load(setup, spec.model, setup.model_folder, device)
    copy_model = zero_loading.empty_copy if setup.plan.zero_stage == SHARDED else copy.deepcopy

    def open_one(weights: specs.TeacherWeights) -> Teacher:
        load = partial(_load_external, setup, device)
        return open_teacher(weights, student, load, lambda one: served[one].score, copy_model)

    def open_frozen(weights: specs.FrozenWeights | specs.ExternalWeights) -> Teacher:
        """Return the teacher that has these weights already, or open them."""
        leaves = zip(teacher.leaves if teacher else (), spec.teachers(), strict=True)
        return next((leaf for leaf, (_, own) in leaves if own == weights), None) or open_one(weights)

    teacher = open_one(spec.teacher.weights) if spec.teacher else None
    reference = open_frozen(specs.FrozenWeights()) if spec.needs_reference else None
    partner = _open_blend_partner(spec.blend, student, reference, open_frozen)
    named = [("student", student), *_foreign("teacher", *(teacher.leaves if teacher else ()))]
    named += _foreign("base of the blend", partner)
    ends = end_ids(student.causal, setup.data.tokenizer, setup.data.turn_end)
    compared_ids, ids_below = compared_vocabulary(named, setup.data, bool(served))
    check_models(setup, named, ends, compared_ids)
    others = _other_weights(student, *(teacher.leaves if teacher else ()), reference, partner)
    with _runnable(setup, student, others, device):
        probe_models(spec, named, device, setup.plan.zero_stage)
        models = Models(
            student=student,
            teacher=teacher,
            reference=reference,
            blend_partner=partner,
            others=others,
            device=device,
            end_ids=ends,
            special_ids=special_ids(setup.data.tokenizer, ends),
            compared_ids=compared_ids,
            ids_below=ids_below,
            longest_pack=measure_longest_pack(setup, named, device),
            pads_samples=may_pad_samples(setup, named, ends),
        )
        _measure_others(setup, models, named)
    if "frozen_models" in setup.spec.training.offload:
        _offload_frozen(models)
    return models


def _offload_frozen(models: Models) -> None:
    leaves = models.teacher.leaves if models.teacher else ()
    moving = {leaf.weights.model for leaf in leaves if leaf.moves and leaf.weights}
    for model, weights in models.others.items():
        if model not in moving:
            weights.sharding = HostParameters(model, models.device)


def _measure_others(setup: RunSetup, models: Models, named: NamedModels) -> None:
    """Measure what is stored with each model's weights."""
    if setup.plan.zero_stage < SHARDED:  # under stage 3 it would not be used
        for _, weights in named:
            weights.takes_prefix = takes_prefix(weights, models.device, setup.longest_sequence, models.longest_pack)
    for weights in models.others.values():
        if not weights.foreign:
            weights.takes_prefix = models.student.takes_prefix
        _ = weights.transform


@contextlib.contextmanager
def _runnable(
    setup: RunSetup, student: Weights, others: Mapping[nn.Module, Weights], device: torch.device
) -> Iterator[None]:
    """Under ZeRO stage 3, shard the models; inside the block they can run."""
    if setup.plan.zero_stage < SHARDED:
        yield
        return
    offload = setup.spec.training.offload
    zero_loading.shard(student, device, offload)
    for weights in others.values():
        if not weights.foreign:
            zero_loading.shard(weights, device, offload)
            zero_loading.copy_shards(student, weights)
    with zero_loading.forward_passes((student, *others.values()), offload):
        yield


def _other_weights(student: Weights, *teachers: Teacher | None) -> dict[nn.Module, Weights]:
    weights = {one.weights.model: one.weights for one in teachers if one and one.weights}
    weights.pop(student.model, None)
    return weights


def _load(setup: RunSetup, spec: specs.ModelSpec, folder: str, device: torch.device) -> Weights:
    """Return a model on the device; under ZeRO stage 3 in host memory, to be sharded, on the first rank alone."""
    sharded = setup.plan.zero_stage == SHARDED
    read = zero_loading.read_on_first_rank if sharded else read_weights
    model: Any = load_model(spec, folder, setup.spec.training.seed, read)
    weights = Weights(model if sharded else model.to(device))
    check_parts(weights.causal)
    if not sharded:
        _ = weights.transform
    return weights


def _load_external(setup: RunSetup, device: torch.device, weights: specs.ExternalWeights) -> nn.Module:
    attention = setup.spec.model.attn_implementation
    spec = specs.ModelSpec(
        path=weights.path, revision=weights.revision, dtype=weights.dtype, attn_implementation=attention
    )
    path = next(path for path, other in setup.spec.other_models() if other == weights)
    with blaming(*path, "path"):
        loaded = _load(setup, spec, resolve_model(weights.path, setup.base), device)
    if setup.plan.zero_stage == SHARDED:  # at once, so that the first rank holds one such model at a time
        zero_loading.shard(loaded, device, setup.spec.training.offload)
    return loaded.model


def _open_blend_partner(
    blend: specs.Blend | None,
    student: Weights,
    reference: Teacher | None,
    open_frozen: Callable[[specs.FrozenWeights | specs.ExternalWeights], Teacher],
) -> Teacher | None:
    """Return the model that the teacher is blended with, if any."""
    if blend is None:
        return None
    if blend.base is None:
        return Teacher(student)
    return reference if isinstance(blend.base, specs.FrozenWeights) else open_frozen(blend.base)


def _foreign(name: str, *teachers: Teacher | None) -> list[tuple[str, Weights]]:
    """Return the weights that are no copy of the student's, with the name that errors use."""
    return [(name, one.weights) for one in teachers if one and one.weights and one.weights.foreign]
