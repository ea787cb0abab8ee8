"""Small runs on the tiny model: their specs, and a few steps of them."""

import contextlib
import json
from io import StringIO
from pathlib import Path
from unittest import mock

import pytest
import torch
import yaml
from attrs import evolve
from rich.console import Console

from sdkit.language.resolved import resolved
from sdkit.language.specs import (
    ColumnSlot,
    DataSpec,
    Decoding,
    Distillation,
    EvaluationSpec,
    ExactReward,
    ExperimentSpec,
    ForwardKl,
    FrozenWeights,
    InlineSource,
    LoraSpec,
    ModelSpec,
    OptimizerSpec,
    OutputSpec,
    RegexReward,
    RolloutSpec,
    Suite,
    Table,
    TeacherSpec,
    TrainingSpec,
    TransformersBackend,
    UserTurn,
    VocabularySupport,
)

ON_RANKS = Path(__file__).parent / "command_on_ranks.py"
LORA = LoraSpec(r=4, lora_alpha=8.0)
QLORA = LoraSpec(r=4, lora_alpha=8.0, quantize_base="nf4")
COLUMNS = Table({"prompt": "prompt", "demonstration": "demonstration", "answer": "answer"})
# The first step of Adam is −lr · g / (|g| + eps): with eps far above |g| and lr = eps it is −g.
MINUS_GRADIENT = OptimizerSpec(lr=1e4, eps=1e4, max_grad_norm=1e9)
PRECISIONS = [("float32", 0), ("float32", 1), ("float32", 2), ("bfloat16", 1)]


def rows(count=6, start=0):
    return tuple(
        Table({"prompt": f"What is {i} + {i}?", "demonstration": f"{i} + {i} = {2 * i}", "answer": str(2 * i)})
        for i in range(start, start + count)
    )


def inline(count=6, start=0):
    return DataSpec(source=InlineSource(rows=rows(count, start)), columns=COLUMNS)


SEES_DEMONSTRATION = UserTurn(
    template="{prompt}\nExample: {demonstration}", slots=Table({"demonstration": ColumnSlot(name="demonstration")})
)


def teacher(weights, sees=SEES_DEMONSTRATION):
    return TeacherSpec(weights=weights, sees=sees)


def distil(**changes):
    parts = {"divergence": ForwardKl(), "support": VocabularySupport()}
    return Table({"distil": Distillation(**(parts | changes))})


def model(folder, dtype="float32", lora=None):
    return ModelSpec(path=str(folder), dtype=dtype, lora=lora)


def rollout(**changes):
    return RolloutSpec(**({"max_new_tokens": 8, "backend": TransformersBackend()} | changes))


def training(**changes):
    return TrainingSpec(**({"steps": 3, "prompts_per_step": 4, "zero_stage": 0} | changes))


def make_spec(folder, **changes):
    """A small run: forward KL to a frozen teacher that sees the demonstration."""
    parts = {
        "model": model(folder),
        "data": inline(),
        "rollout": rollout(),
        "teacher": teacher(FrozenWeights()),
        "losses": distil(),
        "optimizer": OptimizerSpec(lr=1e-3),
        "training": training(),
        "output": OutputSpec(trackers=()),
    }
    return ExperimentSpec(**(parts | changes))


def with_evaluation(spec, **changes):
    """The same run with two held-out suites."""
    suites = {
        "sums": Suite(
            data=inline(4, 100),
            score="right",
            also=("number",),
            decoding=Table({"greedy": Decoding(temperature=0.0), "drawn": Decoding(temperature=1.0, samples=2)}),
            loss_prompts=3,
        ),
        "more": Suite(data=inline(3, 200), score="number"),
    }
    parts = {"suites": Table(suites), "teacher_lift": 2}
    rewards = {"right": ExactReward(), "number": RegexReward(pattern=r"\d")}
    return evolve(spec, evaluation=EvaluationSpec(**(parts | changes)), rewards=Table(rewards))


def scorer_of(*rewards, feedback=None):
    """A scorer that gives these rewards to the rollouts of a step, in order."""
    from sdkit.rewards.scorer import ScoredCompletion, Scorer

    return Scorer(
        lambda pairs: [
            ScoredCompletion(reward=float(rewards[i % len(rewards)]), feedback=feedback) for i in range(len(pairs))
        ]
    )


def collect(trainer, step=0):
    """The rollouts of a training step, with their requests and scores."""
    from sdkit.train.collect_rollouts import collect_rollouts

    rows = trainer.setup.data.batch_rows(step)
    return collect_rollouts(trainer.sampler, rows, ("rollout", step), trainer.specs)


def prepare_rollouts(trainer, batch):
    from sdkit.train import token_statistics

    old = trainer.setup.plan.needs_old_logprobs
    return token_statistics.prepare_rollouts(trainer.learner, batch, trainer.specs, with_old_logprobs=old)


def compute_token_statistics(trainer, batch, names):
    from sdkit.train import token_statistics

    return token_statistics.compute_token_statistics(trainer.learner, batch, names, trainer.specs.blend)


def rollouts_of(trainer, step=0):
    return prepare_rollouts(trainer, collect(trainer, step).batch)


def score_teacher(trainer, batch, reference=None):
    return trainer.learner.scorer.score_teacher(batch, trainer.specs.blend, reference)


def train_step(trainer, batch):
    from sdkit.train import step

    result = step.train_step(trainer.learner, batch, trainer.specs)
    trainer.progress.record(applied=result.applied)
    return result


def evaluate_objective(trainer, batch):
    from sdkit.train import step

    return step.evaluate_objective(trainer.learner, batch, trainer.specs)


def held_out_loss(trainer):
    from sdkit.train import evaluate

    return evaluate.held_out_loss(trainer.sampler, trainer.learner, trainer.setup.spec.evaluation, trainer.specs)


def advance(trainer, updates=3):
    """Optimizer steps outside the training loop; returns each step's StepResult."""
    return [train_step(trainer, rollouts_of(trainer, step)) for step in range(updates)]


def masters(trainer):
    return {name: value.clone() for name, value in trainer.learner.masters()}


def hidden_states(trainer, weights):
    """Hidden states of these weights for fixed token ids, [2, 20, H]."""
    ids = torch.arange(2, 42).reshape(2, 20)
    with torch.no_grad(), weights.active() as causal:
        return causal.base_model(input_ids=ids, use_cache=False).last_hidden_state


def assert_equal(a, b):
    torch.testing.assert_close(a, b, atol=0, rtol=0)


def silent_console():
    return Console(file=StringIO(), width=140)


def train(spec, folder, console=None, **options):
    """A complete run in this process; returns its folder."""
    from sdkit.language.resolved import resolved
    from sdkit.train.run import train as run

    text = json.dumps(resolved(spec))
    return run(
        spec, folder.parent, folder, console or silent_console(), written="# as written\n", resolved=text, **options
    )


@contextlib.contextmanager
def interrupted_before_step(number):
    """Interrupts the run in the block, as a second Ctrl-C does, before the step of this number, from 0."""
    from sdkit.train import loop

    step = loop._train_on_batch

    def interrupt_or_train(trainer, report, current):
        if current == number:
            raise KeyboardInterrupt
        step(trainer, report, current)

    with mock.patch.object(loop, "_train_on_batch", interrupt_or_train), pytest.raises(KeyboardInterrupt):
        yield


def run_two_ranks(warm, spec, folder):
    """Runs the command line on two ranks under stage 3, where no rank holds the weights and files are gathered."""
    path = folder.parent / f"{folder.name}.yaml"
    path.write_text(yaml.safe_dump(resolved(spec)))
    return warm.run(ON_RANKS, 2, folder, "train", path, "--to", folder, "training.zero_stage=3")


def run_scenario(warm, script, folder, work, cases=(), timeout=None):
    """Runs a scenario script in a process of its own on the model in `folder`; returns `work`, where its runs are."""
    done = warm.run(script, folder, work, *cases, timeout=timeout)
    assert done.returncode == 0, done.stderr[-3000:]
    return work


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_status(folder):
    return json.loads((folder / "status.json").read_text())


def metrics(folder):
    """All metrics of a run except those that depend on the machine."""
    return [
        {k: v for k, v in line.items() if not k.startswith(("time/", "memory/"))}
        for line in lines(folder / "metrics.jsonl")
    ]


def weights_of(folder):
    from safetensors.torch import load_file

    return load_file(str(folder / "model" / "model.safetensors"))


def resize_model(source, target, rows):
    """Writes a copy of the model with `rows` output rows, new ones initialized like the others; returns `target`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    causal = AutoModelForCausalLM.from_pretrained(source)
    causal.resize_token_embeddings(rows, mean_resizing=False)
    causal.save_pretrained(target)
    AutoTokenizer.from_pretrained(source).save_pretrained(target)
    return target
