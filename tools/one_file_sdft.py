"""Self-distillation fine-tuning in one file: the plain twin of sdkit/methods/sdft.yaml.

No sdkit import, no DeepSpeed, no vLLM, no chunks, no micro-batches: one sequence at a time, as the paper's algorithm
reads (Shenfeld et al. 2026, 2601.19897, with the values of the authors' code).  A test trains both from the same start
on the same rows and wants the same loss at every step; so this is the tutorial and the proof at once.

    python tools/one_file_sdft.py MODEL_FOLDER ROWS.jsonl --steps 20
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import random
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

TEMPLATE = (
    "\n{prompt}\n\nThis is an example for a response to the question:\n{demonstration}\n\n"
    "Now answer with a response of your own, including the thinking process.\n"
)
UPDATE_RATE = 0.01  # teacher += rate × (student − teacher), after every optimizer step
SKIP_FIRST = 3  # tokens of each completion that the loss leaves out
RATIO_CAP = 2.0
CLIP = 1.0


def seed_of(*names):
    """The seed of a named stream, so that no draw depends on the order of other draws."""
    digest = hashlib.sha256("/".join(map(str, names)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def rows_of_step(rows, step, size, seed):
    """`size` rows of an endless walk; every pass over the data has an order of its own."""
    chosen = []
    for place in range(step * size, (step + 1) * size):
        epoch, index = divmod(place, len(rows))
        order = list(range(len(rows)))
        random.Random(seed_of(seed, "data order", epoch)).shuffle(order)
        chosen.append(rows[order[index]])
    return chosen


def encode(tokenizer, text):
    messages = [{"role": "user", "content": text}]
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"])


@torch.no_grad()
def sample(model, prompt, longest, end, seed):
    """One completion at temperature 1, token by token, with the log-probability of each token."""
    draw = torch.Generator().manual_seed(seed)
    completion, logprobs = [], []
    while len(completion) < longest and end not in completion:
        logits = model(torch.tensor([prompt + completion])).logits[0, -1].float()
        cumulative = logits.log_softmax(-1).double().exp().cumsum(-1)
        target = torch.rand(1, generator=draw, dtype=torch.float64) * cumulative[-1]
        token = int(torch.searchsorted(cumulative, target, right=True).clamp(max=len(cumulative) - 1))
        completion.append(token)
        logprobs.append(float(logits.log_softmax(-1)[token]))
    return completion, torch.tensor(logprobs)


def distributions(model, prompt, completion):
    """Log-probabilities over the vocabulary before each token of the completion, [T, V]."""
    logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    return logits.float().log_softmax(-1)


def sequence_loss(student, teacher, student_prompt, teacher_prompt, completion, sampled):
    """Mean forward KL over the counted tokens, times one importance weight for the sequence."""
    if len(completion) <= SKIP_FIRST:
        return torch.zeros(())
    log_s = distributions(student, student_prompt, completion)
    with torch.no_grad():
        log_t = distributions(teacher, teacher_prompt, completion)
    token_loss = (log_t.exp() * (log_t - log_s)).sum(-1)[SKIP_FIRST:]
    now = log_s.gather(-1, torch.tensor(completion)[:, None])[:, 0].detach()
    ratio = (now - sampled).exp().clamp(max=RATIO_CAP)[SKIP_FIRST:].mean()
    return ratio * token_loss.mean()


@torch.no_grad()
def follow(teacher, student):
    for average, weight in zip(teacher.parameters(), student.parameters(), strict=True):
        average.lerp_(weight, UPDATE_RATE)


def train(folder, rows, steps, prompts_per_step=4, longest=12, lr=1e-3, seed=0):
    """Train on rows with `prompt` and `demonstration`; returns the loss of every step."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    student = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    teacher = copy.deepcopy(student).requires_grad_(False)
    adam = torch.optim.AdamW(student.parameters(), lr=lr, weight_decay=0.0)
    losses = []
    for step in range(steps):
        total = 0.0
        for group, row in enumerate(rows_of_step(rows, step, prompts_per_step, seed)):
            own = encode(tokenizer, row["prompt"])
            context = encode(tokenizer, TEMPLATE.format(**row))
            stream = seed_of(seed, "rollout", step, group, 0)
            completion, sampled = sample(student, own, longest, tokenizer.eos_token_id, stream)
            loss = sequence_loss(student, teacher, own, context, completion, sampled) / prompts_per_step
            if loss.requires_grad:
                loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(student.parameters(), CLIP)
        adam.step()
        adam.zero_grad()
        follow(teacher, student)
        losses.append(total)
        print(f"step {step + 1}  loss {total:.6f}")
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", help="a Hugging Face folder")
    parser.add_argument("rows", type=Path, help="JSON Lines with prompt and demonstration")
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    lines = arguments.rows.read_text(encoding="utf-8").splitlines()
    train(arguments.folder, [json.loads(line) for line in lines], arguments.steps)
