"""Writes what both sides read: a model folder and a JSON Lines file of rows."""

from __future__ import annotations

import functools
import json
import random
from pathlib import Path
from typing import Any

from tools.bench.shapes import Shape

END = "<jupyter_script>"
"""The end token of both sides: a token that the models hardly ever sample, so that completions have equal lengths."""
TEMPLATES = {
    "sdft": "{prompt}\n\nThis is an example for a response to the question:\n{shown}\n\nNow answer with a response of your own.",
    "sdpo": "{prompt}\nCorrect solution:\n\n{shown}\n\nCorrectly solve the original question.",
}
"""The teacher's user turn, on both sides."""
WORDS = [
    "river",
    "stone",
    "lantern",
    "garden",
    "winter",
    "paper",
    "engine",
    "harbor",
    "violin",
    "copper",
    "meadow",
    "signal",
    "orchard",
    "window",
    "ladder",
    "compass",
    "thunder",
    "velvet",
    "market",
    "island",
    "bridge",
    "feather",
    "candle",
    "desert",
    "mirror",
    "anchor",
    "forest",
    "pepper",
    "saddle",
    "tunnel",
]


def rows(shape: Shape, count: int) -> list[dict[str, Any]]:
    """Return rows with a chat as `prompt` and the same text as `demonstration` and `privileged_context`, TRL's name."""
    made = []
    for i in range(count):
        draw = random.Random(i)
        words = " ".join(draw.choice(WORDS) for _ in range(shape.prompt_words))
        shown = " ".join(draw.choice(WORDS) for _ in range(24))
        prompt = [{"role": "user", "content": f"Write a long story with these words: {words}"}]
        made.append({"prompt": prompt, "demonstration": shown, "privileged_context": shown})
    return made


def write_rows(shape: Shape, path: Path) -> None:
    """Write a row for each prompt of each step."""
    lines = (json.dumps(row) for row in rows(shape, shape.prompts * shape.steps))
    path.write_text("\n".join(lines) + "\n")


@functools.cache
def prompt_lengths(shape: Shape, model: Path) -> tuple[float, float]:
    """Return the mean tokens of the student's and of the teacher's prompts.

    A teacher that is shown a completion is counted with one of `max_new_tokens`; decoding and encoding it again may
    change its length a little.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)

    def mean_length(texts: list[str]) -> float:
        chats = [[{"role": "user", "content": text}] for text in texts]
        return sum(
            len(tokenizer.apply_chat_template(c, add_generation_prompt=True)["input_ids"]) for c in chats
        ) / len(chats)

    made = rows(shape, shape.prompts * shape.steps)
    prompts = [row["prompt"][0]["content"] for row in made]
    shown = [row["demonstration"] if shape.trainer == "sdft" else "" for row in made]
    template = TEMPLATES[shape.trainer]
    teacher = mean_length([template.format(prompt=p, shown=s) for p, s in zip(prompts, shown, strict=True)])
    return mean_length(prompts), teacher + (shape.max_new_tokens if shape.trainer == "sdpo" else 0)


def model_folder(shape: Shape, cache: Path) -> Path:
    """Return a folder with the shape's model, written on first use."""
    from sdkit.models.loading import resolve_model

    folder = cache / (f"random-{shape.vocabulary}" if shape.vocabulary else "smollm2-135m")
    if not (folder / "model.safetensors").exists():
        bundled = Path(resolve_model("bundled:smollm2-135m-instruct", Path()))
        folder.mkdir(parents=True, exist_ok=True)
        _write_tokenizer(bundled, folder, shape.vocabulary)
        if shape.vocabulary:
            _write_random_weights(folder, shape.vocabulary)
        else:
            _link_weights(bundled, folder)
    return folder


def _write_tokenizer(bundled: Path, folder: Path, vocabulary: int | None) -> None:
    """Write the bundled tokenizer with END as its end token, and with as many tokens as the model has."""
    tokenizer = json.loads((bundled / "tokenizer.json").read_text())
    ids = tokenizer["model"]["vocab"]
    ids |= {f"<unused{i}>": i for i in range(len(ids), vocabulary or 0)}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = json.loads((bundled / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": END, "pad_token": END}))
    template = (bundled / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text(template.replace("<|im_end|>", END))


def _link_weights(bundled: Path, folder: Path) -> None:
    """Link the bundled weights and write a configuration with END as the end token."""
    end = json.loads((bundled / "tokenizer.json").read_text())["model"]["vocab"][END]
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((bundled / name).read_text()) | {"eos_token_id": end, "pad_token_id": end}
        (folder / name).write_text(json.dumps(settings, indent=1))
    (folder / "model.safetensors").symlink_to(bundled / "model.safetensors")


def _write_random_weights(folder: Path, vocabulary: int) -> None:
    """Write a Llama of four layers of width 256 with random weights in bfloat16."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    ids = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=ids["<|im_start|>"],
        eos_token_id=ids[END],
        pad_token_id=ids[END],
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
