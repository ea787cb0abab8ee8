"""A training step costs little more than the same step in plain torch: a ratio of CPU times, never seconds.

Both sides train the same model on the same rollouts, in alternation, in one process on one thread.  The losses must
agree, so both do the same work.  A busy machine slows both sides, so it changes the ratio little.
"""

import copy
import itertools
import statistics
import time

import pytest
import torch
from tinyruns import COLUMNS, SEES_DEMONSTRATION, distil, make_spec, model, rollout, rollouts_of, train_step, training

from sdkit.language.specs import DatasetSamples, DataSpec, EmaWeights, InlineSource, OptimizerSpec, Table, TeacherSpec
from sdkit.train.run import open_run

VOCABULARY, HIDDEN = 49_152, 256  # the bundled model's vocabulary; wide enough that arithmetic dominates
ROWS, WARM_UP, PAIRS = 8, 1, 5
RATE, LR, DECAY, CLIP = 0.05, 1e-4, 0.01, 1.0
MARGIN = 1.6
"""The largest accepted ratio.  Medians were 1.1 to 1.2 on a machine with other work on all cores."""


@pytest.fixture
def wide_folder(tiny_folder, tmp_path):
    """A Llama of two layers with as many output rows as a real vocabulary."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "wide")
    tokenizer.save_pretrained(tmp_path / "wide")
    return tmp_path / "wide"


@pytest.fixture
def wide_run(wide_folder, process_group, tmp_path):
    """A run on completions of the data set, all of one length: digits without a token of their own in pairs."""
    numbers = map("".join, itertools.islice(itertools.product("5678", repeat=2), ROWS))
    rows = [
        Table({"prompt": f"What is {n}?", "demonstration": f"{n} = {n}", "answer": f"{n}, {n}, {n}, {n}, {n}, {n}"})
        for n in numbers
    ]
    spec = make_spec(
        wide_folder,
        model=model(wide_folder),
        data=DataSpec(source=InlineSource(rows=tuple(rows)), columns=COLUMNS, shuffle=False),
        rollout=rollout(sampled_by=DatasetSamples(column="answer"), max_new_tokens=64),
        teacher=TeacherSpec(weights=EmaWeights(update_rate=RATE), sees=SEES_DEMONSTRATION),
        losses=distil(),
        optimizer=OptimizerSpec(lr=LR, weight_decay=DECAY, decay="all", max_grad_norm=CLIP),
        training=training(steps=WARM_UP + PAIRS, prompts_per_step=ROWS, zero_stage=1),
    )
    trainer = open_run(spec, tmp_path)
    yield trainer
    trainer.close()


class PlainTwin:
    """The same step with transformers and torch alone: forward KL over the vocabulary, AdamW, a moving teacher."""

    def __init__(self, folder, batch):
        from transformers import LlamaForCausalLM

        self.student = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.adam = torch.optim.AdamW(self.student.parameters(), lr=LR, weight_decay=DECAY, fused=True)
        self.completions = torch.tensor([r.completion_ids for r in batch])
        self.student_ids = self.prompted([r.prompt_ids for r in batch])
        self.teacher_ids = self.prompted([r.teacher_prompt_ids for r in batch])

    def prompted(self, prompts):
        return torch.cat([torch.tensor(prompts), self.completions], dim=1)

    def logprobs(self, causal, ids):
        """Log-probabilities before each token of the completions, [N, T, V]."""
        states = causal.model(ids, use_cache=False).last_hidden_state[:, -self.completions.shape[1] - 1 : -1]
        return (states @ causal.lm_head.weight.T).log_softmax(-1)

    def step(self):
        """One optimizer step; returns its loss."""
        with torch.no_grad():
            teacher = self.logprobs(self.teacher, self.teacher_ids)
        student = self.logprobs(self.student, self.student_ids)
        loss = (teacher.exp() * (teacher - student)).sum(-1).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), CLIP)
        self.adam.step()
        self.adam.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(list(self.teacher.parameters()), list(self.student.parameters()), RATE)
        return loss.item()


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def cpu_seconds(step):
    """The processor time of this process during one step, and what it returned."""
    started = time.process_time()
    value = step()
    return time.process_time() - started, value


def test_a_step_costs_little_more_than_plain_torch(wide_folder, wide_run, one_thread):
    batch = rollouts_of(wide_run)
    twin = PlainTwin(wide_folder, batch)
    ratios = []
    for number in range(WARM_UP + PAIRS):
        own, result = cpu_seconds(lambda: train_step(wide_run, batch))
        plain, loss = cpu_seconds(twin.step)
        assert result.metrics["loss"] == pytest.approx(loss, rel=1e-4)
        if number >= WARM_UP:
            ratios.append(own / plain)
    assert statistics.median(ratios) < MARGIN, ratios
