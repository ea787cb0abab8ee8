"""Builds a tiny random Llama with its own tokenizer, for smoke runs and tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

CORPUS = (
    "The quick brown fox jumps over the lazy dog. What is 3 + 9 + 2 = 14? How many letters are in the word?",
    "Answer with just the number. This is an example for a response to the question: <answer>12</answer>",
    "Now answer with a response of your own, including the thinking process. Correct solution: feedback",
)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build(folder: Path, seed: int = 0, vocabulary: int = 512) -> Path:
    """Write model and tokenizer to `folder` in Hugging Face format; the same seed gives the same weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = make_tokenizer(vocabulary)
    random_state = torch.get_rng_state()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,  # head dimension 32, the smallest that vLLM supports on CPU
        num_key_value_heads=1,
        max_position_embeddings=8192,
        initializer_range=0.2,  # large enough that the context changes the predictions
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    torch.set_rng_state(random_state)
    tokenizer.save_pretrained(folder)
    return folder


def make_tokenizer(vocabulary: int) -> Any:
    """Return the tokenizer, whose chat template writes messages of any role and no tools."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    bpe.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    special = ["<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=special, initial_alphabet=alphabet)
    bpe.train_from_iterator([text for text in CORPUS for _ in range(4)], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|im_end|>")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
