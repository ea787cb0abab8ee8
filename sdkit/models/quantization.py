"""Stores the frozen linear layers under LoRA adapters in 4 bits, by bitsandbytes (QLoRA, Dettmers 2023, arXiv 2305.14314).

Blocks of 64 values have one scale in 8 bits; blocks of 256 scales have one in float32 (*double quantization*).  Every use of
a weight starts from the same rounded values, in the dtype of the model, so merged copies are as exact as without it.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections import Counter
from typing import Any

from torch import Tensor, nn

from sdkit.language.errors import BadData, BadEnvironment

KEY = ("model", "lora", "quantize_base")

# PEFT imports bitsandbytes, which on some CPUs says that it found no kernels of the hub's; `_quantized` does without them.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def check_installed() -> None:
    """Raise BadEnvironment if bitsandbytes is missing."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise BadEnvironment(
            "model.lora.quantize_base needs a package that is missing: bitsandbytes",
            hint="pip install 'sdkit[bitsandbytes]'",
            path=KEY,
        )


def quantize(model: Any) -> None:
    """Replace the linear layers by 4-bit ones, whose weights are quantized when the model moves to its device.

    The output projection, layers that share their weights, and experts stacked in one tensor stay as they are.  Raises BadData
    if that leaves none.
    """
    head = model.get_output_embeddings()
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    layers = [
        (name, layer)
        for name, layer in model.named_modules()
        if type(layer) is nn.Linear and layer is not head and uses[id(layer.weight)] == 1
    ]
    if not layers:
        raise BadData("the model has no linear layers to quantize", hint="leave out quantize_base", path=KEY)
    for name, layer in layers:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, _quantized(layer))


def dequantized(parameter: Tensor) -> Tensor:
    """Returns a parameter's values, detached; for a quantized one a new tensor of its full shape in the model's dtype."""
    state = quant_state(parameter)
    if state is None:
        return parameter.detach()
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(parameter.data, state)


def plain_layer(layer: nn.Module) -> nn.Module:
    """Returns the layer, or in place of a quantized one a linear layer with the same values."""
    weight: Any = getattr(layer, "weight", None)  # None: stacked experts
    if quant_state(weight) is None:
        return layer
    values, bias = dequantized(weight), getattr(layer, "bias", None)
    plain: Any = nn.Linear(values.shape[1], values.shape[0], bias=bias is not None, device="meta")
    plain.weight, plain.bias = nn.Parameter(values, requires_grad=False), bias
    return plain


def quant_state(parameter: Tensor) -> Any:
    """Returns bitsandbytes' scales of a quantized parameter; None if it is not quantized."""
    return getattr(parameter, "quant_state", None)


def _quantized(layer: nn.Linear) -> nn.Module:
    layers: Any = importlib.import_module("bitsandbytes.nn")  # Any: the types of its parameters are incomplete
    dtype = layer.weight.dtype
    quantized = layers.Linear4bit(
        layer.in_features, layer.out_features, bias=layer.bias is not None, compute_dtype=dtype, device="meta"
    )
    quantized.weight = layers.Params4bit(layer.weight.data, quant_type="nf4", compress_statistics=True)
    quantized.bias = layer.bias
    # On some CPUs it would repack the weights in the first pass without gradients, with kernels from the hub.
    quantized.support_avx512bf16_for_cpu = False
    quantized.register_load_state_dict_pre_hook(_load_scales)
    return quantized


def _load_scales(layer: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Take the scales from a state dict: bitsandbytes writes them there, but does not read them."""
    from bitsandbytes.functional import QuantState

    mark = f"{prefix}weight."
    stored = {name.removeprefix(mark): state.pop(name) for name in list(state) if name.startswith(mark)}
    if stored:
        layer.weight.quant_state = QuantState.from_dict(stored, device=layer.weight.device)
