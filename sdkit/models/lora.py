"""LoRA adapters: attaches them to the spec's targets, and checks that they get gradients and can be merged."""

from __future__ import annotations

import contextlib
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from sdkit.language.errors import BadData, first_line
from sdkit.language.specs import LoraSpec
from sdkit.models.probes import probe_sequence
from sdkit.models.quantization import plain_layer
from sdkit.models.weights import STUDENT_ADAPTER, Sharding, Weights, adapted_parameter, adapter_layers
from sdkit.seeds import derive

KEY = ("model", "lora", "target_modules")
MERGE_ERROR = 0.1
ROUNDING_ERRORS = 2
"""Largest allowed difference between merged weights and the adapter's forward pass: a share of the adapter's effect, and so
many rounding errors of the layer's output, which may be far larger than the effect."""


def attach(model: Any, lora: LoraSpec, seed: int) -> Any:
    """Returns the model with new adapters, initialized from `seed`.  Raises BadData if a target is no linear layer."""
    from peft import LoraConfig, get_peft_model

    candidates = _linear_names(model)
    targets = () if lora.target_modules == "all-linear" else lora.target_modules
    _refuse_embeddings(model, targets, candidates)
    config = LoraConfig(
        target_modules=list(targets) or "all-linear",
        r=lora.r,
        lora_alpha=lora.lora_alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=0.0,
    )
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(seed, "adapter"))
            adapted = get_peft_model(model, config, adapter_name=STUDENT_ADAPTER, autocast_adapter_dtype=False)
    except ValueError as error:
        non_linear = _first_non_linear(model, targets)
        reason = f"{non_linear} is no linear layer" if non_linear else first_line(error)
        blamed = {name for name in candidates if f"'{name}'" in reason}  # by PEFT, linear or not
        raise _bad_targets(reason, sorted({*candidates} - blamed)) from None
    _check_layers(adapted, config, targets, candidates)
    return adapted


def _linear_names(model: Any) -> list[str]:
    """Returns the short names of linear layers that can have an adapter, without their path in the model."""
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


def _matches(name: str, target: str) -> bool:
    """Whether a target matches this module name, by PEFT's rule."""
    return name == target or name.endswith(f".{target}")


def _refuse_embeddings(model: Any, targets: Sequence[str], candidates: Sequence[str]) -> None:
    ends = {
        id(model.get_output_embeddings()): "the output projection, which the loss applies itself",
        id(model.get_input_embeddings()): "the embedding",
    }
    for name, module in model.named_modules():
        if id(module) in ends and (target := next((t for t in targets if _matches(name, t)), None)):
            raise _bad_targets(f'"{target}" is {ends[id(module)]}: it cannot have an adapter', candidates)


def _first_non_linear(model: Any, targets: Sequence[str]) -> str | None:
    """Returns the first module that a target matches and that is not linear; some adapters may be attached already."""
    for name, module in model.named_modules():
        linear = isinstance(module, _linear_classes()) or hasattr(module, "lora_A")
        if not linear and any(_matches(name, target) for target in targets):
            return name
    return None


def _check_layers(model: Any, config: Any, targets: Sequence[str], candidates: Sequence[str]) -> None:
    """Raise BadData unless every target matches a layer and every adapted layer is linear or a stack of experts."""
    from peft.tuners.lora.layer import Conv1d, Conv2d, Conv3d, Embedding, MultiheadAttention, ParamWrapper

    names = [name for name, module in model.named_modules() if hasattr(module, "lora_A")]
    fused = {t for t in targets if config.target_parameters and t not in config.target_modules}
    for target in targets:
        if target not in fused and not any(_matches(name, target) for name in names):
            raise _bad_targets(f'no layer is called "{target}"', candidates)
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    unsupported = (Conv1d, Conv2d, Conv3d, Embedding, MultiheadAttention)
    for name, layer in model.named_modules():
        if not hasattr(layer, "lora_A"):
            continue
        short = name.removeprefix("base_model.model.")
        if isinstance(layer, unsupported):
            raise _bad_targets(f"{short} is no linear layer", candidates)
        stacked = isinstance(layer, ParamWrapper)
        if not stacked and uses[id(adapted_parameter(layer))] > 1:
            raise _bad_targets(f"{short} shares its weights with another layer", candidates)


def check(weights: Weights, device: torch.device, stage: int) -> None:
    """Raise BadData if a kind of adapter gets no gradient, or if merging changes what it computes.

    The factors B, which start at zero, are random during the check and restored after it.
    """
    layers = list(adapter_layers(weights.model))
    try:
        _check(weights, layers, device, stage)
    except _CheckFailed as failure:
        raise _bad_targets(str(failure), _callable_names(weights, device)) from None


class _CheckFailed(Exception):
    """The reason why adapters cannot be trained on these layers."""


def _check(weights: Weights, layers: Sequence[Any], device: torch.device, stage: int) -> None:
    from peft.tuners.lora.layer import ParamWrapper

    if stage == 3 and any(isinstance(layer, ParamWrapper) for layer in layers):
        raise _CheckFailed("adapters of fused experts do not work under training.zero_stage: 3")
    with _random_factors(weights.sharding, layers), _recorded_calls(layers) as calls:
        with torch.enable_grad():
            try:
                hidden = weights.hidden(probe_sequence(weights, device))
            except (AttributeError, RuntimeError, TypeError, ValueError) as error:
                reason = f"the model does not run with these adapters ({first_line(error)})"
                raise _CheckFailed(reason) from None
            generator = torch.Generator().manual_seed(0)
            loss = (hidden.float() * torch.randn(hidden.shape, generator=generator).to(device)).sum()
            _check_gradients(weights, loss)
        weights.sharding.release()
        with torch.no_grad():
            _check_merged(weights, layers, calls)


@torch.no_grad()
def _callable_names(weights: Weights, device: torch.device) -> list[str]:
    """Returns the names of linear layers that the model calls and that return one tensor."""
    usable: dict[str, bool] = {}

    def record(module: nn.Module, args: Any, output: Any) -> None:
        name = names[id(module)]
        usable[name] = usable.get(name, True) and isinstance(output, Tensor)

    names: dict[int, str] = {}
    with contextlib.ExitStack() as hooks:
        for path, module in weights.causal.named_modules():
            if isinstance(module, _linear_classes()) and ".lora_" not in path:
                names[id(module)] = path.removesuffix(".base_layer").rpartition(".")[2]
                hooks.enter_context(module.register_forward_hook(record))
        Weights(weights.model, None).hidden(probe_sequence(weights, device))
    return sorted(name for name, is_usable in usable.items() if is_usable)


def _check_gradients(weights: Weights, loss: Tensor) -> None:
    """Raise _CheckFailed if no layer of a kind gets a gradient; single layers may be idle, such as unused experts."""
    trainable = {n: p for n, p in weights.causal.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(loss, list(trainable.values()), allow_unused=True)
    reached: dict[str, bool] = {}
    for name, gradient in zip(trainable, gradients, strict=True):
        nonzero = gradient is not None and bool(gradient.any())
        reached[_kind(name)] = reached.get(_kind(name), False) or nonzero
    for kind in (kind for kind, is_reached in reached.items() if not is_reached):
        layer = kind.partition(".lora_")[0].replace(".base_layer", "")
        raise _CheckFailed(f"the loss does not reach the adapter of {layer}")


def _check_merged(weights: Weights, layers: Sequence[Any], calls: Mapping[int, Any]) -> None:
    """Raise _CheckFailed if, for a kind of layer, merged weights do not compute the same as the adapter."""
    names = {id(module): name for name, module in weights.causal.named_modules()}
    done: set[str] = set()
    for layer in layers:
        kind = _kind(names[id(layer)])
        if kind in done or id(layer) not in calls:
            continue
        done.add(kind)
        args, kwargs, output = calls[id(layer)]
        base = layer.get_base_layer()
        own = [adapter for adapter in layers if adapter.get_base_layer() is base]
        plain = _Unhooked(plain_layer(base))
        with weights.sharding.gather([parameter for adapter in own for parameter in adapter.parameters()]):
            merged = {f"base.{getattr(a, 'parameter_name', 'weight')}": weights.merged(a) for a in own}
            expected = _first_tensor(torch.func.functional_call(plain, merged, args, kwargs))
            effect = (output - _first_tensor(plain(*args, **kwargs))).float().norm()
        rounding = torch.finfo(output.dtype).eps * output.float().norm()
        if not (output - expected).float().norm() <= MERGE_ERROR * effect + ROUNDING_ERRORS * rounding:
            raise _CheckFailed(f"merged weights of {kind} do not act as their adapter")


class _Unhooked(nn.Module):
    """Calls a layer without its hooks: those of ZeRO stage 3 would release the parameters that the caller gathered."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base.forward(*args, **kwargs)


def _first_tensor(output: Any) -> Tensor:
    """Returns a layer's output; for a router, which returns several tensors, the logits."""
    return output if isinstance(output, Tensor) else output[0]


@contextlib.contextmanager
def _random_factors(sharding: Sharding, layers: Sequence[Any]) -> Iterator[None]:
    """Inside the block, the student's factors B are random, and large enough to show in bfloat16."""
    generator = torch.Generator().manual_seed(0)
    factors = [layer.lora_B[STUDENT_ADAPTER].weight for layer in layers]
    originals = [sharding.local_shard(factor).clone() for factor in factors]
    for layer, factor in zip(layers, factors, strict=True):
        size = 1 / (layer.scaling[STUDENT_ADAPTER] * math.sqrt(layer.r[STUDENT_ADAPTER]))
        sharding.write(factor, torch.randn(sharding.full_shape(factor), generator=generator) * size)
    try:
        yield
    finally:
        for factor, value in zip(factors, originals, strict=True):
            sharding.local_shard(factor).copy_(value)


@contextlib.contextmanager
def _recorded_calls(layers: Sequence[Any]) -> Iterator[dict[int, Any]]:
    """Yields the arguments and output of each layer's call, by its id.  Copied, because models modify outputs in place."""
    calls: dict[int, Any] = {}
    inputs: dict[int, Any] = {}

    def copy(values: Any) -> Any:
        return tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), values)

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        inputs[id(module)] = copy((args, kwargs))

    def after(module: nn.Module, args: Any, output: Any) -> None:
        calls[id(module)] = (*inputs.pop(id(module)), copy(_first_tensor(output)))

    with contextlib.ExitStack() as hooks:
        for layer in layers:
            hooks.enter_context(layer.register_forward_pre_hook(before, with_kwargs=True))
            hooks.enter_context(layer.register_forward_hook(after))
        yield calls


def _kind(name: str) -> str:
    """Returns a module name with the layer and expert numbers replaced by `*`."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def _bad_targets(reason: str, candidates: Sequence[str]) -> BadData:
    hint = f"layers that can have an adapter: {', '.join(candidates)}" if candidates else None
    return BadData(f"model.lora.target_modules: {reason}", hint=hint, path=KEY)
