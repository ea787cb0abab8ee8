"""Checks below a run: environment, collectives, draws, AdamW, attention, projected loss."""

from __future__ import annotations

import importlib.util
import platform
from functools import partial
from importlib import metadata
from typing import Any, Literal

import torch

from tools.gpu_check.setup import Check, Setup, Skipped, measure

PACKAGES = ("torch", "transformers", "deepspeed", "peft", "safetensors", "numpy")


def environment(setup: Setup) -> dict[str, Any]:
    """Versions, and what the GPU is."""
    found: dict[str, Any] = {name: metadata.version(name) for name in PACKAGES} | {"python": platform.python_version()}
    if setup.on_cpu:
        return found
    properties = torch.cuda.get_device_properties(0)
    return found | {
        "gpu": properties.name,
        "gib": round(properties.total_memory / 2**30, 1),
        "capability": list(torch.cuda.get_device_capability(0)),
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        "bfloat16": torch.cuda.is_bf16_supported(),
        "flash_attn": importlib.util.find_spec("flash_attn") is not None,
    }


def collectives(setup: Setup) -> dict[str, Any]:
    """The process group of one rank, with the backend of the device: reductions and objects come back as they are."""
    from sdkit.distributed import collectives, zero

    zero.start()
    values = torch.arange(4.0, device=setup.device)
    summed = values.clone()
    torch.distributed.all_reduce(summed)
    objects: list[Any] = [None]
    torch.distributed.all_gather_object(objects, {"a": 1})
    torch.distributed.broadcast_object_list(objects)
    named = collectives.sum_scalars({"x": values.sum()})
    collectives.barrier()
    backend = torch.distributed.get_backend()
    zero.stop()
    return {"backend": backend, "ok": torch.equal(summed, values) and objects == [{"a": 1}] and named == {"x": 6.0}}


def draws(setup: Setup) -> dict[str, Any]:
    """Tokens drawn on the device and on the CPU from the same logits and seeds."""
    from sdkit.batches import SamplingParams, SamplingRequest
    from sdkit.sampling.transformers import SeededSampler

    rows, vocabulary = (8, 1000) if setup.miniature else (256, 151_936)
    sampling = SamplingParams(temperature=0.8, top_p=0.95, top_k=0, max_new_tokens=1)
    requests = [SamplingRequest(prompt_ids=(0,), seed=seed) for seed in range(rows)]
    logits = torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(0))
    tokens = [
        SeededSampler(requests, sampling)(torch.zeros(rows, 1), logits.to(device)).argmax(-1).cpu()
        for device in (torch.device("cpu"), setup.device)
    ]
    different = int((tokens[0] != tokens[1]).sum())
    return {"draws": rows, "different": different, "ok": different <= rows // 100}


def adamw(setup: Setup) -> dict[str, Any]:
    """Three steps of the optimizer under DeepSpeed against torch's AdamW in float64 on the CPU."""
    from sdkit.distributed import zero
    from sdkit.language.specs import OptimizerSpec

    zero.start()
    torch.manual_seed(0)
    start = torch.randn(512, 64)
    module = torch.nn.Linear(64, 512, bias=False)
    module.weight.data.copy_(start)
    spec = OptimizerSpec(lr=1e-2, weight_decay=0.1)
    engine = zero.Zero(module.to(setup.device), spec, 0, bf16=False)
    expected = torch.nn.Parameter(start.double())
    reference = torch.optim.AdamW([expected], lr=1e-2, weight_decay=0.1, foreach=False)
    for step in range(3):
        inputs = torch.randn(8, 64, generator=torch.Generator().manual_seed(step)) / 100
        engine.backward(engine.forward(inputs.to(setup.device)).square().mean())
        (inputs.double() @ expected.T).square().mean().backward()
        engine.step(1e-2)
        reference.step()
        reference.zero_grad()
    difference = float((module.weight.detach().cpu() - expected).abs().max())
    zero.stop()
    return {"largest_difference": difference, "ok": difference < 1e-5}


def attention(kernel: Literal["sdpa", "eager", "flash_attention_2"], length: int, setup: Setup) -> dict[str, Any]:
    """Forward and backward pass of two layers of width 2,048 over one row."""
    if kernel == "flash_attention_2":
        setup.needs_gpu()
        if importlib.util.find_spec("flash_attn") is None:
            raise Skipped("flash-attn is not installed")
    weights = _two_layers(setup, kernel)
    size = 32 if setup.miniature else length
    return _pass_figures(setup, weights, [(1,) * (size - 1)], [(2,)], 0)


def shared_rows(share: bool, setup: Setup) -> dict[str, Any]:
    """Eight completions of 128 tokens after a prompt of 1,024: in one row under a mask, or each in its own."""
    weights = _two_layers(setup, "sdpa")
    prompt, completion = (8, 4) if setup.miniature else (1024, 128)
    return _pass_figures(setup, weights, [(1,) * prompt] * 8, [(2,) * completion] * 8, 2048 if share else 0)


def _two_layers(setup: Setup, kernel: str) -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig

    from sdkit.models.weights import Weights

    width = 64 if setup.miniature else 2048
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=2,
        num_attention_heads=width // 32 if setup.miniature else 16,
        max_position_embeddings=32_768,
    )
    with setup.device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=kernel)
    return Weights(model.eval())


def _pass_figures(
    setup: Setup, weights: Any, prompts: list[tuple[int, ...]], completions: list[tuple[int, ...]], longest: int
) -> dict[str, Any]:
    from sdkit.models.packing import pad_sequences

    wanted = [range(len(completion)) for completion in completions]
    batch = pad_sequences(prompts, completions, wanted, longest, setup.device)

    def run() -> None:
        weights.hidden(batch).float().square().mean().backward()
        weights.model.zero_grad()

    return {"tokens": batch.tokens} | measure(setup, run)


def projected_loss(support: Literal["vocabulary", "top_k"], setup: Setup) -> dict[str, Any]:
    """Loss and gradients of 2,048 tokens at 152k ids and width 3,584, in chunks of 256."""
    from sdkit.batches import HiddenStateScores, Tokens
    from sdkit.language.specs import Distillation, ForwardKl, Table, TopKSupport, VocabularySupport
    from sdkit.losses import chunks
    from sdkit.losses.objective import Objective

    count, vocabulary, width = (16, 1000, 32) if setup.miniature else (2048, 151_936, 3584)
    options: Any = {"device": setup.device, "dtype": torch.bfloat16}
    hidden = torch.randn(count, width, **options, requires_grad=True)
    head = (torch.randn(vocabulary, width, **options) / 50).requires_grad_()
    teacher = HiddenStateScores(hidden=torch.randn(count, width, **options), head=head.detach())
    row = torch.arange(count, device=setup.device)
    tokens = Tokens(
        token=row,
        row=row,
        weights={"distil": torch.full((count,), 1 / count, device=setup.device)},
        sampler_logprobs=None,
        old_logprobs=None,
    )
    of_support = (
        VocabularySupport()
        if support == "vocabulary"
        else TopKSupport(k=100, chosen_by="student", remainder="tail_bucket")
    )
    objective = Objective(Table({"distil": Distillation(divergence=ForwardKl(), support=of_support)}), 1.0)

    def run() -> None:
        hidden.grad = head.grad = None
        chunks.projected_loss(hidden, head, teacher, tokens, objective, 256)[0].backward()

    return measure(setup, run)


def ema(setup: Setup) -> dict[str, Any]:
    """One update of an averaged teacher of 100 tensors, which the host waits for once."""
    from sdkit.language.specs import EmaWeights
    from sdkit.models.teachers import AveragedTeacher
    from sdkit.models.weights import Weights

    size = 16 if setup.miniature else 2048
    with setup.device:
        layers = torch.nn.ModuleList(torch.nn.Linear(size, size, bias=False) for _ in range(100)).bfloat16()
    teacher = AveragedTeacher(Weights(layers), dict(layers.named_parameters()))
    teacher.initialize()
    masters = {name: parameter.detach().float() for name, parameter in layers.named_parameters()}
    spec = EmaWeights(update_rate=0.1)
    return measure(setup, lambda: teacher.follow(masters.items, spec, spec.every, 1))


BASICS: dict[str, Check] = {"environment": environment, "collectives": collectives, "draws": draws, "AdamW": adamw}
LENGTHS = (2048, 8192, 16_384)
SPEED: dict[str, Check] = {
    **{f"attention, sdpa, {n} tokens": partial(attention, "sdpa", n) for n in LENGTHS},
    **{f"attention, flash_attention_2, {n} tokens": partial(attention, "flash_attention_2", n) for n in LENGTHS},
    "attention, eager, 2048 tokens": partial(attention, "eager", 2048),
    "shared rows": partial(shared_rows, True),
    "rows of their own": partial(shared_rows, False),
    "projected loss, vocabulary": partial(projected_loss, "vocabulary"),
    "projected loss, top k": partial(projected_loss, "top_k"),
    "average of the teacher": ema,
}
