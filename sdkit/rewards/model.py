"""A reward model: a local sequence-classification model that scores the chat.  Knows nothing of groups."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from attrs import frozen

from sdkit.language.errors import BadData
from sdkit.language.files import library_reads
from sdkit.language.specs import RewardModel
from sdkit.models.device import rank_device
from sdkit.models.loading import fixed_date
from sdkit.rewards.scorer import Pair, ScoredCompletion, Scorer


@frozen(eq=False)
class Classifier:
    """A model with one output, and its tokenizer."""

    model: Any
    tokenizer: Any
    special: tuple[str, ...]
    path: str

    def ids(self, completion: str, row: Any, now: datetime) -> list[int]:
        """Encodes prompt and completion with this model's chat template, which prints the date `now` if it prints one.

        Special tokens spelled in the completion are removed, so that it cannot end its own turn.  Raises BadData if the
        text is longer than the model's context or contains a token without an embedding.
        """
        for word in self.special:
            completion = completion.replace(word, "")
        messages = [*map(dict, row.messages), {"role": "assistant", "content": completion}]
        with library_reads(f"row {row.index}: the chat template of the reward model {self.path}"):
            ids = self.tokenizer.apply_chat_template(
                messages, tokenize=True, return_dict=True, **fixed_date(self.tokenizer, now)
            )["input_ids"]
        limit = getattr(self.model.config, "max_position_embeddings", None)
        if limit and len(ids) > limit:
            raise BadData(
                f"row {row.index} and its completion have {len(ids)} tokens, the reward model {self.path} reads {limit}"
            )
        rows = self.model.get_input_embeddings().weight.shape[0]
        if max(ids) >= rows:
            token = self.tokenizer.convert_ids_to_tokens(max(ids))
            raise BadData(
                f"row {row.index} has the token {token!r} with id {max(ids)}, but the reward model {self.path} has "
                f"{rows} embeddings"
            )
        return ids

    def score(self, texts: Sequence[list[int]]) -> list[float]:
        """Scores one batch, padded on the right."""
        longest = max(map(len, texts))
        pad = self.model.config.pad_token_id
        padded = [ids + [pad] * (longest - len(ids)) for ids in texts]
        mask = [[1] * len(ids) + [0] * (longest - len(ids)) for ids in texts]
        device = self.model.device
        with torch.inference_mode():
            output = self.model(
                input_ids=torch.tensor(padded, device=device), attention_mask=torch.tensor(mask, device=device)
            )
        return output.logits[:, 0].double().tolist()


def reward_model(reward: RewardModel, base: Path, now: Callable[[], datetime]) -> Scorer:
    """Returns a scorer that gives the model's output for prompt and completion; `now` returns the run's date.

    Raises BadData if the folder has no such model; the scorer raises it if a text is too long or the output is not
    finite.
    """
    classifier = _open(reward.path, (base / reward.path).resolve())

    def score_all(pairs: Sequence[Pair]) -> list[ScoredCompletion]:
        texts = [classifier.ids(text, row, now()) for text, row in pairs]
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # to reduce padding
        outputs: dict[int, float] = {}
        for first in range(0, len(order), reward.batch_size):
            places = order[first : first + reward.batch_size]
            outputs |= zip(places, classifier.score([texts[i] for i in places]), strict=True)
        for place, value in outputs.items():
            if not math.isfinite(value):
                raise BadData(f"the reward model {reward.path} gives {value} for row {pairs[place][1].index}")
        return [ScoredCompletion(reward=outputs[i]) for i in range(len(pairs))]

    return Scorer(score_all, check_row=lambda row: classifier.ids("", row, now()))


@functools.lru_cache(maxsize=2)
def _open(path: str, folder: Path) -> Classifier:
    """Loads from the folder only: no hub, no remote code, no pickles."""
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    device = rank_device()
    with library_reads(f"the reward model {path} cannot be loaded"):
        config = AutoConfig.from_pretrained(folder, **local)
        tokenizer = AutoTokenizer.from_pretrained(folder, **local)
        model, loaded = AutoModelForSequenceClassification.from_pretrained(
            folder,
            config=config,
            use_safetensors=True,
            dtype="auto" if device.type == "cuda" else torch.float32,
            output_loading_info=True,
            **local,
        )
    if config.num_labels != 1 or loaded["missing_keys"]:
        what = f"{config.num_labels} outputs" if config.num_labels != 1 else "no trained output"
        raise BadData(f"the reward model {path} has {what}; a reward is one number")
    if not tokenizer.chat_template:
        raise BadData(f"the tokenizer of the reward model {path} has no chat template")
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    if model.config.pad_token_id is None:
        raise BadData(f"the reward model {path} has no padding token")
    rows = model.get_input_embeddings().weight.shape[0]
    if not 0 <= model.config.pad_token_id < rows:
        raise BadData(f"the reward model {path} pads with id {model.config.pad_token_id}, but has {rows} embeddings")
    special = tuple(t.content for t in tokenizer.added_tokens_decoder.values() if t.special)
    return Classifier(model.eval().to(device), tokenizer, special, path)
