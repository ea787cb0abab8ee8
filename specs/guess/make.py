"""Makes the start model of guess.yaml, which is in `model`, again: `python specs/guess/make.py`, about two minutes on one core.

It has 17 words, 3 layers of width 64, and knows how a game looks, not how to win one.  It has learnt from games of random
guesses, half of them with the secret in the prompt: there it names the secret in every turn; elsewhere it guesses evenly.
"""

import random
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

NUMBERS = [str(n) for n in range(1, 10)]
SPECIAL = ["<pad>", "<user>", "<assistant>", "<end>"]
WORDS = [*SPECIAL, "guess", "secret", "higher", "lower", *NUMBERS]
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
TURNS, GAMES, STEPS = 4, 64, 1500


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        eos_token="<end>",
        additional_special_tokens=["<user>", "<assistant>"],
        clean_up_tokenization_spaces=False,
    )
    made.chat_template = TEMPLATE
    return made


def game(draw: random.Random) -> tuple[list[str], list[str]]:
    """The words of a game of random guesses, and for each word the next one to learn, or "" where nothing is."""
    secret, told = draw.choice(NUMBERS), draw.random() < 0.5
    prompt = ["<user>", "guess", *(["secret", secret] if told else []), "<end>", "<assistant>"]
    words, targets = prompt, [""] * len(prompt)
    for _ in range(TURNS):
        guess = draw.choice(NUMBERS)
        targets[-1] = secret if told else draw.choice(NUMBERS)  # whatever was guessed
        words = [*words, guess, "<end>", "<user>", "higher" if guess < secret else "lower", "<end>", "<assistant>"]
        targets = [*targets, "<end>", "", "", "", "", ""]
    return words[:-4], targets[:-4]


def train(model: LlamaForCausalLM) -> None:
    draw, ids = random.Random(0), {word: i for i, word in enumerate(WORDS)}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for step in range(STEPS):
        games = [game(draw) for _ in range(GAMES)]
        longest = max(len(words) for words, _ in games)
        inputs = torch.zeros(GAMES, longest, dtype=torch.long)
        labels = torch.full((GAMES, longest), -100)
        for row, (words, targets) in enumerate(games):
            inputs[row, : len(words)] = torch.tensor([ids[word] for word in words])
            labels[row, : len(words)] = torch.tensor([ids[word] if word else -100 for word in targets])
        logits = model(inputs).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 250 == 0:
            print(f"step {step}/{STEPS}  loss {loss.item():.3f}", flush=True)


def main(folder: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=WORDS.index("<end>"),
    )
    model = LlamaForCausalLM(config)
    train(model)
    model.to(torch.bfloat16).save_pretrained(folder)  # half the bytes to store
    tokenizer().save_pretrained(folder)
    print(f"wrote {folder}: {sum(p.numel() for p in model.parameters())} parameters")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "model")
