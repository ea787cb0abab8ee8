"""Small runs on the tiny model: their specs, and a few steps of them."""

import json
from io import StringIO

import torch
from attrs import evolve
from rich.console import Console

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

LORA = LoraSpec(r=4, lora_alpha=8.0)
COLUMNS = Table({"prompt": "prompt", "demonstration": "demonstration", "answer": "answer"})
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
        "output": OutputSpec(tensorboard=False),
    }
    return ExperimentSpec(**(parts | changes))


def evaluated(spec, **changes):
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


def collect(world, step=0):
    """The rollouts of a training step, with their requests and scores."""
    from sdkit.train.collect_rollouts import collect_rollouts

    rows = world.setup.data.batch_rows(step)
    return collect_rollouts(world.sampler, rows, ("rollout", step), world.specs)


def prepare_rollouts(world, batch):
    from sdkit.train import token_statistics

    old = world.setup.plan.needs_old_logprobs
    return token_statistics.prepare_rollouts(world.learner, batch, world.specs, with_old_logprobs=old)


def compute_token_statistics(world, batch, names):
    from sdkit.train import token_statistics

    return token_statistics.compute_token_statistics(world.learner, batch, names, world.specs.blend)


def rollouts_of(world, step=0):
    return prepare_rollouts(world, collect(world, step).batch)


def score_teacher(world, batch, reference=None):
    return world.learner.scorer.score_teacher(batch, world.specs.blend, reference)


def train_step(world, batch):
    from sdkit.train import step

    result = step.train_step(world.learner, batch, world.specs)
    world.progress.record(applied=result.applied)
    return result


def evaluate_objective(world, batch):
    from sdkit.train import step

    return step.evaluate_objective(world.learner, batch, world.specs)


def held_out_loss(world):
    from sdkit.train import evaluate

    return evaluate.held_out_loss(world.sampler, world.learner, world.setup.spec.evaluation, world.specs)


def advance(world, updates=3):
    """Optimizer steps without a loop around them; what each measured."""
    return [train_step(world, rollouts_of(world, step)) for step in range(updates)]


def masters(world):
    return {name: value.clone() for name, value in world.learner.masters()}


def states(world, weights):
    """Hidden states of these weights on the first rollouts' tokens, [N, S, H] flattened."""
    ids = torch.arange(2, 42).reshape(2, 20)
    with torch.no_grad(), weights.active() as causal:
        return causal.base_model(input_ids=ids, use_cache=False).last_hidden_state


def same(a, b):
    torch.testing.assert_close(a, b, atol=0, rtol=0)


def silent():
    return Console(file=StringIO(), width=140)


def train(spec, folder, console=None, **options):
    """A whole run, in this process."""
    from sdkit.language.resolved import resolved
    from sdkit.train.run import train as run

    text = json.dumps(resolved(spec))
    return run(spec, folder.parent, folder, console or silent(), written="# as written\n", resolved=text, **options)


def run_scenario(warm, script, folder, work, cases=()):
    """A scenario of attempts in processes of their own, on the model in `folder`; returns where it left its runs."""
    done = warm.run(script, folder, work, *cases)
    assert done.returncode == 0, done.stderr[-3000:]
    return work


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def metrics(folder):
    """Every metric of a run but those that depend on the machine."""
    return [
        {k: v for k, v in line.items() if not k.startswith(("time/", "memory/"))}
        for line in lines(folder / "metrics.jsonl")
    ]


def weights_of(folder):
    from safetensors.torch import load_file

    return load_file(str(folder / "model" / "model.safetensors"))


def resized(source, target, rows):
    """The model with another number of output rows; new ones are drawn as the others were."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    causal = AutoModelForCausalLM.from_pretrained(source)
    causal.resize_token_embeddings(rows, mean_resizing=False)
    causal.save_pretrained(target)
    AutoTokenizer.from_pretrained(source).save_pretrained(target)
    return target
