"""Measures which packed rows a run can use: how long a shared row may be, and whether padding changes hidden states.

The mask of a shared row replaces a sliding window or any other mask of the model's own, and no mask separates
completions in a recurrent layer.  So a row may only be as long as the rows whose hidden states were compared.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from attrs import evolve
from torch import Tensor

from sdkit.batches import PrefixGroup, SamplingParams, SamplingRequest
from sdkit.language.errors import BadData
from sdkit.language.specs import TransformersBackend
from sdkit.models.logit_transform import decoder
from sdkit.models.packing import (
    LONGEST_PACK,
    PROMPT,
    SHORT,
    Ids,
    completions_leak,
    differs,
    last_states,
    pad_sequences,
    probe_texts,
    same_states,
    sees_ahead,
    shares_rows,
)
from sdkit.models.prefix import states_by_group
from sdkit.models.weights import Weights
from sdkit.sampling.transformers import TransformersRollouts
from sdkit.train.model_checks import NamedModels
from sdkit.train.setup import RunSetup

WINDOW_KEY = re.compile(r"(window|window_size|chunk_size)$")


def measure_longest_pack(setup: RunSetup, models: NamedModels, device: torch.device) -> int:
    """The longest shared row, in tokens, that every model of the run can take; 0 if rows cannot be shared.

    Raises BadData if padding changes the hidden states of a text.
    """
    training, text = setup.spec.training, setup.longest_sequence
    for who, weights in models:
        width = min(text, training.micro_batch_tokens // 2)  # longest row that fits beside another
        if width > PROMPT + SHORT and (padding_shows(weights, device, width) or sees_ahead(weights, device)):
            raise BadData(
                f"the {who} gives a text other hidden states where it is padded to {width} tokens, so losses would "
                "depend on what stands beside it in a micro-batch",
                hint="set training.micro_batch_tokens: 1, so that every text runs alone",
                path=("teacher", "weights") if weights.foreign else ("model", "path"),
            )
    if not training.share_prompts:
        return 0
    longest = min(LONGEST_PACK, max(setup.spec.rollout.completions_per_prompt, 2) * text)
    for _, weights in models:
        longest = longest_shared(weights, device, longest, text)
    return longest


def longest_shared(weights: Weights, device: torch.device, wanted: int, text: int) -> int:
    """The longest row, up to `wanted` tokens, that completions can share; 0 if they cannot share rows.

    text: tokens of the longest prompt and completion.  Within a sliding window a shared row changes nothing, so if a
    long row fails, shorter ones are tried.
    """
    if not weights.takes_mask:
        return 0
    shortest = PROMPT + 2 * SHORT
    longest = min(wanted, *_attention_windows(weights.causal.config), LONGEST_PACK)
    if longest < shortest or not shares_rows(weights, device) or completions_leak(weights, device):
        return 0
    while longest > shortest and not shares_rows(weights, device, longest, text):
        longest = max(longest // 2, shortest)
    return longest


def _attention_windows(config: Any) -> list[int]:
    """Every positive integer of the text configuration whose name is that of a window or chunk size."""
    values: list[Any] = []
    for name, value in config.get_text_config().to_dict().items():
        if WINDOW_KEY.search(name):
            values += value if isinstance(value, list) else [value]
    return [v for v in values if isinstance(v, int) and not isinstance(v, bool) and v > 0]


@torch.no_grad()
def padding_shows(weights: Weights, device: torch.device, width: int) -> bool:
    """Whether padding a short text to `width` tokens changes its hidden states."""
    prompt, long, short, _ = probe_texts(weights, width - PROMPT)
    padded = last_states(weights, device, prompt, [long, short], 0)[1]
    (alone,) = last_states(weights, device, prompt, [short], 0)
    return not same_states(weights, padded, alone)


def takes_prefix(weights: Weights, device: torch.device, text: int, longest_pack: int) -> bool:
    """Whether tokens get the same states after a prefix that a pass of its own computed once for all rows.

    text: tokens of the longest prompt and completion.  A prefix longer than each attention window is tried too.
    """
    windows = _attention_windows(weights.causal.config)
    lengths = [PROMPT + SHORT, *(w + SHORT for w in windows if w < text)]
    try:
        return not any(prefix_shows(weights, device, length, longest_pack) for length in lengths)
    except (RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError):  # its cache is of another kind
        return False


@torch.no_grad()
def prefix_shows(weights: Weights, device: torch.device, length: int, longest_pack: int) -> bool:
    """Whether running a prefix of `length` tokens apart changes the states after it, in shared rows or others.

    Passes of the same shapes reveal leaks below the tolerance of `same_states`: tokens must see neither later ones nor
    another completion of a shared row.
    """
    prompt, prefix, short, other = probe_texts(weights, length)
    prompts = [prefix + prompt, prefix + prompt, prefix + short]
    wanted = [range(1, SHORT + 1), range(SHORT), range(SHORT)]

    def states(later: Ids, longest: int, *, apart: bool) -> Tensor:
        batch = pad_sequences(prompts, [short + later, prompt, prompt], wanted, longest, device)
        rows, width = batch.input_ids.shape
        group = PrefixGroup(start=0, end=rows, prefix=length, width=width)
        with weights.active() as causal:
            grouped = evolve(batch, prefix_groups=(group,))
            return (states_by_group(decoder(causal), grouped) if apart else weights.hidden(batch)).float()

    together = states(other[:SHORT], 0, apart=False)
    for longest in {0, longest_pack}:
        apart, changed = (states(later[:SHORT], longest, apart=True) for later in (other, prefix))
        by_text = zip(apart.split(SHORT), changed.split(SHORT), strict=True)
        if not same_states(weights, apart, together) or any(differs(weights, *pair) for pair in by_text):
            return True
    return False


def may_pad_samples(setup: RunSetup, models: NamedModels, end_ids: tuple[int, ...]) -> bool:
    """Whether the transformers backend may pad prompts to equal lengths; True if the run does not use that backend."""
    backends = setup.plan.backend, setup.plan.evaluation_backend
    if not any(isinstance(backend, TransformersBackend) for backend in backends):
        return True
    return not any(padding_shows_in_samples(weights, setup.data.tokenizer, end_ids) for _, weights in models)


def padding_shows_in_samples(weights: Weights, tokenizer: Any, end_ids: tuple[int, ...]) -> bool:
    """Whether padding a prompt to the length of a longer one changes the probabilities of the tokens sampled from it."""
    _, long, short, _ = probe_texts(weights, 2 * SHORT)
    requests = [SamplingRequest(prompt_ids=ids, seed=0) for ids in (long, short)]
    sampling = SamplingParams(temperature=0.0, top_p=1.0, top_k=0, max_new_tokens=2)
    backend = TransformersRollouts(tokenizer, len(requests), end_ids)
    backend.load(weights, 0)
    padded = backend.sample(requests, sampling)[1].logprobs
    alone = backend.sample(requests[1:], sampling)[0].logprobs
    assert padded is not None
    assert alone is not None
    bound = 1e-3 if weights.head.dtype == torch.float32 else 0.3
    return not all(abs(a - b) < bound for a, b in zip(padded, alone, strict=False))
