"""LoRA adapters: attach them where the spec says, and check that the loss reaches them and that they can be merged."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from sdkit.language.errors import BadData, first_line
from sdkit.language.specs import LoraSpec
from sdkit.models.probes import probe
from sdkit.models.weights import STUDENT_ADAPTER, Weights, adapted_parameter, adapter_layers
from sdkit.seeds import derive

KEY = ("model", "lora", "targets")
MERGE_ERROR = 0.1
"""Largest difference of merged weights from the adapter's own forward pass, as a share of the adapter's effect."""


def attach(model: Any, lora: LoraSpec, seed: int) -> Any:
    """The model with new adapters, drawn from `seed`.  Raises BadData where the targets name no plain linear layers."""
    from peft import LoraConfig, get_peft_model

    working = _linear_names(model)
    targets = () if lora.targets == "all_linear" else lora.targets
    _refuse_embeddings(model, targets, working)
    config = LoraConfig(
        target_modules=list(targets) or "all-linear",
        r=lora.rank,
        lora_alpha=lora.alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=0.0,
    )
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(seed, "adapter"))
            adapted = get_peft_model(
                model, config, adapter_name=STUDENT_ADAPTER, autocast_adapter_dtype=False
            )
    except ValueError as error:
        other = _not_linear(model, targets)
        reason = f"{other} is no linear layer" if other else first_line(error)
        blamed = (name for name in working if f"'{name}'" in reason)  # by PEFT, linear or not
        raise _refusal(reason, sorted({*working} - {*blamed})) from None
    _check_layers(adapted, config, targets, working)
    return adapted


def _linear_names(model: Any) -> list[str]:
    """The names of linear layers that can have an adapter, without their place in the model."""
    head = model.get_output_embeddings()
    names = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, _linear_classes()) and module is not head
    }
    return sorted(name for name in names if not name.isdecimal())


def _linear_classes() -> tuple[type[nn.Module], ...]:
    from transformers.pytorch_utils import Conv1D

    return nn.Linear, Conv1D


def _named(name: str, target: str) -> bool:
    """Whether a target names this module, as PEFT matches them."""
    return name == target or name.endswith(f".{target}")


def _refuse_embeddings(model: Any, targets: Sequence[str], working: Sequence[str]) -> None:
    ends = {
        id(model.get_output_embeddings()): "the output projection, which the loss applies itself",
        id(model.get_input_embeddings()): "the embedding",
    }
    for name, module in model.named_modules():
        if id(module) in ends and (target := next((t for t in targets if _named(name, t)), None)):
            raise _refusal(f'"{target}" is {ends[id(module)]}: it cannot have an adapter', working)


def _not_linear(model: Any, targets: Sequence[str]) -> str | None:
    """A module that some target names and that is not linear; adapters may be on some that are."""
    for name, module in model.named_modules():
        linear = isinstance(module, _linear_classes()) or hasattr(module, "lora_A")
        if not linear and any(_named(name, target) for target in targets):
            return name
    return None


def _check_layers(model: Any, config: Any, targets: Sequence[str], working: Sequence[str]) -> None:
    """Every target names a layer, and every layer with an adapter is linear, or a stack of experts."""
    from peft.tuners.lora.layer import (
        Conv1d,
        Conv2d,
        Conv3d,
        Embedding,
        MultiheadAttention,
        ParamWrapper,
    )

    names = [name for name, module in model.named_modules() if hasattr(module, "lora_A")]
    fused = {t for t in targets if config.target_parameters and t not in config.target_modules}
    for target in targets:
        if target not in fused and not any(_named(name, target) for name in names):
            raise _refusal(f'no layer is called "{target}"', working)
    uses: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    unlike_linear = (Conv1d, Conv2d, Conv3d, Embedding, MultiheadAttention)
    for name, layer in model.named_modules():
        if not hasattr(layer, "lora_A"):
            continue
        short = name.removeprefix("base_model.model.")
        if isinstance(layer, unlike_linear):
            raise _refusal(f"{short} is no linear layer", working)
        stacked = isinstance(layer, ParamWrapper)
        if not stacked and uses[id(adapted_parameter(layer))] > 1:
            raise _refusal(f"{short} shares its weights with another layer", working)


def check(weights: Weights, device: torch.device, stage: int) -> None:
    """Raise BadData where a kind of adapter gets no gradient from the loss, or cannot be merged as it acts.

    The factors B, which start at zero, are random during the check and zero again after it.
    """

    layers = list(adapter_layers(weights.model))
    try:
        _check(weights, layers, device, stage)
    except _Failure as failure:
        raise _refusal(str(failure), _callable_names(weights, device)) from None


class _Failure(Exception):
    """Why adapters cannot be trained where they are."""


def _check(weights: Weights, layers: Sequence[Any], device: torch.device, stage: int) -> None:
    from peft.tuners.lora.layer import ParamWrapper

    if stage == 3 and any(isinstance(layer, ParamWrapper) for layer in layers):
        raise _Failure("adapters of fused experts do not work under training.zero_stage: 3")
    with _random_factors(layers), _recorded_calls(layers) as calls:
        with torch.enable_grad():
            try:
                hidden = weights.hidden(probe(weights, device))
            except (AttributeError, RuntimeError, TypeError, ValueError) as error:
                reason = f"the model does not run with these adapters ({first_line(error)})"
                raise _Failure(reason) from None
            draw = torch.Generator().manual_seed(0)
            loss = (hidden.float() * torch.randn(hidden.shape, generator=draw).to(device)).sum()
            _check_gradients(weights, loss)
        with torch.no_grad():
            _check_merged(weights, layers, calls)


@torch.no_grad()
def _callable_names(weights: Weights, device: torch.device) -> list[str]:
    """The names of linear layers that the model calls, each with one tensor as the result."""
    usable: dict[str, bool] = {}

    def record(module: nn.Module, args: Any, output: Any) -> None:
        name = names[id(module)]
        usable[name] = usable.get(name, True) and isinstance(output, Tensor)

    names: dict[int, str] = {}
    handles: list[Any] = []
    for path, module in weights.causal.named_modules():
        if isinstance(module, _linear_classes()) and ".lora_" not in path:
            names[id(module)] = path.removesuffix(".base_layer").rpartition(".")[2]
            handles.append(module.register_forward_hook(record))
    try:
        Weights(weights.model, None).hidden(probe(weights, device))
    finally:
        for handle in handles:
            handle.remove()
    return sorted(name for name, is_usable in usable.items() if is_usable)


def _check_gradients(weights: Weights, loss: Tensor) -> None:
    """One layer in a kind may be idle, such as an expert that no token is sent to; not all of them."""
    mine = {n: p for n, p in weights.causal.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(loss, list(mine.values()), allow_unused=True)
    reached: dict[str, bool] = {}
    for name, gradient in zip(mine, gradients, strict=True):
        nonzero = gradient is not None and bool(gradient.any())
        reached[_kind(name)] = reached.get(_kind(name), False) or nonzero
    for kind in (kind for kind, is_reached in reached.items() if not is_reached):
        layer = kind.partition(".lora_")[0].replace(".base_layer", "")
        raise _Failure(f"the loss does not reach the adapter of {layer}")


def _check_merged(weights: Weights, layers: Sequence[Any], calls: Mapping[int, Any]) -> None:
    """Of each kind, the base layer with merged weights does what it does with the adapter."""
    names = {id(module): name for name, module in weights.causal.named_modules()}
    done: set[str] = set()
    for layer in layers:
        kind = _kind(names[id(layer)])
        if kind in done or id(layer) not in calls:
            continue
        done.add(kind)
        args, kwargs, output = calls[id(layer)]
        base = layer.get_base_layer()
        own = [each for each in layers if each.get_base_layer() is base]
        merged = {_parameter_name(each): weights.merged(each) for each in own}
        expected = _first_tensor(torch.func.functional_call(base, merged, args, kwargs))
        effect = (output - _first_tensor(base(*args, **kwargs))).float().norm()
        if not (output - expected).float().norm() <= MERGE_ERROR * effect:
            raise _Failure(f"merged weights of {kind} do not act as their adapter")


def _first_tensor(output: Any) -> Tensor:
    """A layer's output; of a router, which returns several tensors, the logits."""
    return output if isinstance(output, Tensor) else output[0]


def _parameter_name(layer: Any) -> str:
    return getattr(layer, "parameter_name", "weight")


@contextlib.contextmanager
def _random_factors(layers: Sequence[Any]) -> Iterator[None]:
    """Inside the block the student's factors B are random, and large enough to see in bfloat16."""
    draw = torch.Generator().manual_seed(0)
    factors = [layer.lora_B[STUDENT_ADAPTER].weight for layer in layers]
    before = [factor.detach().clone() for factor in factors]
    with torch.no_grad():
        for layer, factor in zip(layers, factors, strict=True):
            size = 1 / (layer.scaling[STUDENT_ADAPTER] * math.sqrt(layer.r[STUDENT_ADAPTER]))
            factor.copy_(torch.randn(factor.shape, generator=draw) * size)
    try:
        yield
    finally:
        with torch.no_grad():
            for factor, value in zip(factors, before, strict=True):
                factor.copy_(value)


@contextlib.contextmanager
def _recorded_calls(layers: Sequence[Any]) -> Iterator[dict[int, Any]]:
    """What each layer was called with, and what it returned; by its id.  Copies: models add to outputs in place."""
    calls: dict[int, Any] = {}
    given: dict[int, Any] = {}

    def copied(values: Any) -> Any:
        return tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), values)

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        given[id(module)] = copied((args, kwargs))

    def after(module: nn.Module, args: Any, output: Any) -> None:
        calls[id(module)] = (*given.pop(id(module)), copied(_first_tensor(output)))

    handles = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in layers]
    handles += [layer.register_forward_hook(after) for layer in layers]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _kind(name: str) -> str:
    """A name without the numbers of layers and experts."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def _refusal(reason: str, working: Sequence[str]) -> BadData:
    hint = f"layers that can have an adapter: {', '.join(working)}" if working else None
    return BadData(f"model.lora.targets: {reason}", hint=hint, path=KEY)
