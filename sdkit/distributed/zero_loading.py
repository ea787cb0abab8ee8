"""Loads models for ZeRO stage 3: no device ever holds a complete model, and of all ranks only the first does, in host memory.

The first rank reads the weights; the others build the model on the `meta` device, which stores no values.  Every rank
then takes its shards, one parameter at a time.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import swap_tensors

from sdkit.distributed import zero, zero_shards
from sdkit.distributed.collectives import all_gather_object, broadcast_object, rank
from sdkit.language.errors import BadData, SdkitError
from sdkit.language.specs import ModelSpec
from sdkit.models.loading import build_without_weights, read_weights
from sdkit.models.weights import Weights

T = TypeVar("T")
_HOOK_STATE = ("pre_bwd_fn", "post_bwd_fn", "applied_pre_backward_ref_cnt", "ds_grads_remaining")
"""What a DeepSpeed engine leaves in a module, and the next engine would take for its own."""


def read_on_first_rank(spec: ModelSpec, located: str) -> nn.Module:
    """Returns the model without adapters: with its weights on the first rank, on the `meta` device on the others.

    Raises the same BadData on every rank if the weights cannot be read.
    """
    model: Any = _on_first_rank(lambda: read_weights(spec, located))
    if model is None:
        model = build_without_weights(spec, located)
    main = next(model.parameters()).dtype
    for parameter in model.parameters():  # as DeepSpeed does to a model that is not sharded yet
        if parameter.is_floating_point() and parameter.dtype != main:
            parameter.data = parameter.data.to(main)
    _build_like_first_rank(model, located)
    model.generation_config = broadcast_object(model.generation_config)
    return model


def empty_copy(model: nn.Module) -> nn.Module:
    """Returns a copy of a model that is not sharded yet, with its parameters on the `meta` device."""
    empty = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, memo=dict(empty))


def shard(weights: Weights, device: torch.device, offload: Sequence[str]) -> None:
    """Move a model to `device`, with the first rank's buffers and this rank's shards of the first rank's parameters.

    Parameters that are on the `meta` device on every rank get undefined values.
    """
    import deepspeed

    _share_buffers(weights.model, device)
    convert: Any = None
    for parameter in weights.model.parameters():
        if parameter.is_meta:
            undefined = torch.empty_like(parameter, device=device)
            swap_tensors(parameter, nn.Parameter(undefined, parameter.requires_grad))
        if convert:
            convert(param_list=[parameter])
        else:
            options = zero_shards.settings(offload).get("offload_param", {})
            remote = {"remote_device": options.get("device"), "pin_memory": options.get("pin_memory", False)}
            deepspeed.zero.Init(module=nn.ParameterList([parameter]), dtype=parameter.dtype, **remote)
            sharded: Any = parameter
            convert = sharded.convert_to_zero_parameters
    weights.sharding = zero_shards.ShardedParameters()


@torch.no_grad()
def copy_shards(source: Weights, target: Weights) -> None:
    """Copy this rank's shards of one model's parameters into another's of the same architecture."""
    own = dict(target.model.named_parameters())
    for name, parameter in source.model.named_parameters():
        target.sharding.local_shard(own[name]).copy_(source.sharding.local_shard(parameter))


@contextlib.contextmanager
def forward_passes(models: Sequence[Weights], offload: Sequence[str]) -> Iterator[None]:
    """Inside the block, sharded models can run: for checks before the engines of the run are opened."""
    engines: list[Any] = []
    try:
        for weights in models:
            root, head = zero_shards.Root(weights.model), weights.head_parameters
            engines.append(zero.open_forward_only(root, offload))
            release_all = engines[-1].optimizer.partition_all_parameters
            weights.sharding = zero_shards.Zero3Sharding(root, head, release_all)
        yield
    finally:
        for weights, engine in zip(models, engines, strict=False):
            engine.destroy()
            weights.sharding = zero_shards.ShardedParameters()
            for module in weights.model.modules():
                for name in _HOOK_STATE:
                    module.__dict__.pop(name, None)


def _on_first_rank(function: Callable[[], T]) -> T | None:
    """Returns the function's result on the first rank, None on the others; every rank raises its SdkitError."""
    value, failure = None, None
    if rank() == 0:
        try:
            value = function()
        except SdkitError as error:
            failure = error
    if failure := broadcast_object(failure):
        raise failure
    return value


def _build_like_first_rank(model: nn.Module, located: str) -> None:
    """Give the parameters of the other ranks the first rank's data types and ties, which reading the weights may set."""
    own = dict(model.named_parameters(remove_duplicate=False))
    groups: dict[int, list[str]] = {}
    for name, parameter in own.items():
        groups.setdefault(id(parameter), []).append(name)
    layout = broadcast_object([(names, own[names[0]].shape, own[names[0]].dtype) for names in groups.values()])
    if any(all_gather_object(sorted(own) != sorted(name for names, _, _ in layout for name in names))):
        raise BadData(f"{located} holds other parameters than its config.json describes")
    for names, shape, dtype in layout if rank() else ():
        parameter = nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"))
        for name in names:
            _set_tensor(model, name, parameter)


def _share_buffers(model: nn.Module, device: torch.device) -> None:
    """Move the buffers to `device`, with the first rank's values."""
    for name, buffer in list(model.named_buffers(remove_duplicate=False)):
        value = torch.empty_like(buffer, device=device) if buffer.is_meta else buffer.to(device).contiguous()
        torch.distributed.broadcast(value.view(-1).view(torch.uint8), src=0)
        _set_tensor(model, name, value)


def _set_tensor(model: nn.Module, name: str, value: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, value)
