"""Several ranks: small runs under every ZeRO stage, to be compared with one plain process.

`python ranks_scenario.py MODEL_FOLDER WORK_FOLDER OTHER_MODEL` runs two ranks; the first one writes what was found to
WORK_FOLDER/found.pt.  test_ranks.py says what it must be.
"""

import sys
from pathlib import Path

import forked
import torch
from attrs import evolve
from tinyruns import (
    LORA,
    collect,
    distil,
    evaluated,
    held_out_loss,
    make_spec,
    model,
    rollout,
    rollouts_of,
    teacher,
    train_step,
    training,
)

from sdkit.batches import SamplingRequest
from sdkit.checkpoints import checkpoint
from sdkit.distributed import collectives, zero
from sdkit.language.specs import (
    ColumnSlot,
    CopyWeights,
    DatasetSamples,
    DataSpec,
    EmaWeights,
    ExternalWeights,
    FrozenWeights,
    InlineSource,
    MaskSpec,
    OptimizerSpec,
    ReferenceKl,
    RoutedWeights,
    StudentWeights,
    Table,
    TeacherSpec,
    TransformersBackend,
    TrustRegionBlend,
    UserTurn,
)
from sdkit.train.collect_rollouts import rollout_records, sort_records
from sdkit.train.evaluate import evaluate, teacher_lift
from sdkit.train.run import open_run
from sdkit.train.sampling_requests import sampling_params

DEADLINE = 400.0  # seconds
STEPS, PROMPTS = 3, 4
# With eps far above every gradient Adam is plain momentum: no element's step is its sign alone.
# Norms are not decayed, so there are two groups of parameters.
SMOOTH = OptimizerSpec(lr=3e2, eps=1e4, max_grad_norm=1.0, weight_decay=1e-4)
EMA, COPY, FROZEN, LIVE = (EmaWeights(update_rate=0.3), CopyWeights(every=2), FrozenWeights(), StudentWeights())
ONE, SEVERAL = 8192, 100
"""Padded tokens of a micro-batch: all rollouts of a rank, or one or two."""


def completion(i):
    """Of unequal lengths.  In the second step every second row, all of one rank of two, has nothing behind the mask."""
    return "9" if i in (5, 7) else " ".join(f"{n} + {i}" for n in range(1 + i % 5))


def own_rows():
    columns = ("prompt", "demonstration", "answer", "own", "topic")
    rows = [
        Table(
            dict(
                zip(
                    columns,
                    (f"What is {i} + {i}?", f"{i} + {i} = {2 * i}", "1", completion(i), "abc"[i % 3]),
                    strict=True,
                )
            )
        )
        for i in range(STEPS * PROMPTS)
    ]
    names = Table({name: name for name in columns})
    return DataSpec(source=InlineSource(rows=tuple(rows)), columns=names, shuffle=False)


SEES = UserTurn(
    template="{prompt}\nExample: {demonstration}", slots=Table({"demonstration": ColumnSlot(name="demonstration")})
)


def small(folder, weights=EMA, stage=0, budget=ONE, lora=None, dtype="float32", **changes):
    """A run on completions of the data set, so that rounding cannot change what is trained on."""
    losses = changes.pop("losses", distil(mask=MaskSpec(skip_first=2)))
    blend = changes.pop("blend", None)
    return make_spec(
        folder,
        model=model(folder, dtype, lora),
        data=own_rows(),
        rollout=rollout(sampled_by=DatasetSamples(column="own"), max_new_tokens=32),
        teacher=TeacherSpec(weights=weights, sees=SEES, blend=blend),
        losses=losses,
        optimizer=SMOOTH,
        training=training(steps=STEPS, zero_stage=stage, micro_batch_tokens=budget, chunk_tokens=7, **changes),
    )


def kinds(other):
    """Teachers by name, with what goes with each; the same whatever the stage and the number of ranks."""
    external = ExternalWeights(path=str(other), dtype="float32")
    routed = RoutedWeights(by="topic", routes=Table({"a": EMA, "b": external, "c": LIVE}))
    held = Table({"near": ReferenceKl(estimator="vocabulary", coefficient=0.5)})
    measured = distil(mask=MaskSpec(student_entropy_top=0.5))
    return {
        "average": {"weights": EMA},
        "average, adapters": {"weights": EMA, "lora": LORA},
        "copy": {"weights": COPY},
        "copy, adapters": {"weights": COPY, "lora": LORA},
        "frozen": {"weights": FROZEN},
        "frozen, adapters": {"weights": FROZEN, "lora": LORA},
        "live": {"weights": LIVE},
        "live, adapters": {"weights": LIVE, "lora": LORA},
        "another model": {"weights": external},
        "routed": {"weights": routed},
        "trust region, reference": {
            "weights": EMA,
            "blend": TrustRegionBlend(student_share=0.3),
            "losses": Table({**distil(), **held}),
        },
        "measured": {"weights": EMA, "losses": measured},
    }


ON_TWO_RANKS = [
    *[("average", stage, SEVERAL) for stage in (0, 1, 2, 3)],
    ("average", 3, ONE),
    *[("average, adapters", stage, SEVERAL) for stage in (1, 3)],
    ("copy, adapters", 2, ONE),
    *[(name, 3, ONE) for name in kinds("x") if not name.startswith("average")],
]


def whole(shards, parameter, piece):
    """A parameter from the pieces of all ranks."""
    shape = getattr(parameter, "ds_shape", None)
    if shape is None:
        return piece.clone()
    joined = torch.cat(collectives.all_gather_object(piece.clone()))
    return joined[: shape.numel()].view(shape)


def trained(spec, work):
    """Losses, norms, distances, masters and the teacher's average after three updates."""
    world = open_run(spec, work)
    found = {"loss": [], "grad_norm": [], "distance": [], "micro_batches": []}
    for step in range(STEPS):
        measured = train_step(world, rollouts_of(world, step))
        for name in ("loss", "grad_norm"):
            found[name].append(measured.metrics[name])
        found["distance"].append(measured.metrics.get("teacher_distance", 0.0))
    found |= weights_of(world)
    world.close()
    return found


def weights_of(world):
    own = {n.removeprefix("model."): p for n, p in world.learner.zero.named}
    shards = world.models.student.sharding
    found = {"masters": {n: whole(shards, own[n], v) for n, v in world.learner.masters()}}
    parts = [part for part in world.models.teacher.leaves if part.moves]
    found["shadow"] = {n: whole(shards, part.parameters[n], v) for part in parts for n, v in part.shadow.items()}
    return found


# ── what only several ranks can show ──────────────────────────────────────────────────────────


def skipped(folder, work, stage):
    """A gradient that is not finite on the last rank alone, then a good step."""
    world = open_run(small(folder, stage=stage), work)
    before = weights_of(world)
    _, parameter = world.learner.zero.named[0]
    last = collectives.rank() == collectives.world_size() - 1
    spoiled = parameter.register_hook(lambda g: g * float("nan") if last else g)
    bad = train_step(world, rollouts_of(world, 0))
    spoiled.remove()
    after = weights_of(world)
    good = train_step(world, rollouts_of(world, 0))
    world.close()
    same = all(torch.equal(v, after[kind][n]) for kind in ("masters", "shadow") for n, v in before[kind].items())
    return {"applied": [bad.applied, good.applied], "unchanged": same}


def sampled(folder, work, stage):
    """Rollouts, evaluations, and completions that end at other lengths on each rank."""
    spec = make_spec(
        folder,
        teacher=teacher(EMA),
        rollout=rollout(completions_per_prompt=2, max_new_tokens=6, backend=TransformersBackend(batch_size=3)),
        training=training(zero_stage=stage),
    )
    world = open_run(evaluated(spec, teacher_lift=3), work)
    gathered = collect(world, 0)
    backend, _ = world.sampler.backends.load(world.models.student, world.progress.optimizer_steps)
    ids = world.setup.data.student_ids(world.setup.data.train[0])
    limit = 2 + 7 * collectives.rank() if collectives.world_size() > 1 else 9
    settings = evolve(sampling_params(world.setup.spec.rollout, world.models.ids_below), max_new_tokens=limit)
    mine = [SamplingRequest(prompt_ids=ids, seed=5)] * (1 + 4 * (collectives.rank() == 0))
    own = [c.ids for c in backend.sample(mine, settings)]
    evaluation = world.setup.spec.evaluation
    held = evaluate(world.sampler, evaluation, world.progress.optimizer_steps)
    lift = teacher_lift(world.sampler, evaluation, held, world.specs)
    found = {
        "rollouts": sort_records(collectives.gather_object(rollout_records(gathered))),
        "unequal": collectives.all_gather_object(own),
        "scores": held.scores,
        "records": held.records,
        "lift": {key: value.mean for key, value in lift.items()},
        "held out": held_out_loss(world),
    }
    world.close()
    return found


def streamed(folder, work, lora):
    """The tensors of student and teacher, and how much of the model was ever whole."""
    world = open_run(small(folder, stage=3, lora=lora), work)
    train_step(world, rollouts_of(world, 0))
    every = list(world.models.student.model.parameters())
    found = {}
    for who, weights in (("student", world.models.student), ("teacher", world.models.teacher.weights)):
        most, tensors = 0, {}
        for name, tensor in weights.named_tensors():
            most = max(most, sum(p.numel() for p in weights.model.parameters()))
            tensors[name] = tensor.clone()
        found[who] = tensors
        found[f"{who} whole"] = most / sum(p.ds_numel for p in every)
    found["left whole"] = sum(p.numel() for p in every)
    world.close()
    return found


def resumed(folder, work, stage, lora):
    """Two updates, written down; one more, and the same from what was written."""
    spec = small(folder, stage=stage, lora=lora)
    place = work / f"resumed-{stage}-{bool(lora)}"
    world = open_run(spec, work)
    for step in range(2):
        train_step(world, rollouts_of(world, step))
    world.progress.step = 2
    saved = checkpoint.save(world.state, place, world.setup.spec)
    train_step(world, rollouts_of(world, 2))
    straight = weights_of(world)
    world.close()
    world = open_run(spec, work)
    checkpoint.load(world.state, saved, world.setup.spec.training.seed)
    train_step(world, rollouts_of(world, 2))
    again = weights_of(world)
    world.close()
    return {"straight": straight, "again": again}


def rank(folder, work, other):
    zero.start()
    made = kinds(other)
    found = {
        "trained": {
            (name, stage, budget): trained(small(folder, stage=stage, budget=budget, **made[name]), work)
            for name, stage, budget in ON_TWO_RANKS
        },
        "offloaded": trained(small(folder, stage=3, offload=("optimizer", "parameters")), work),
        "bfloat16": trained(small(folder, stage=3, dtype="bfloat16"), work),
        "skipped": {stage: skipped(folder, work, stage) for stage in (0, 2, 3)},
        "sampled": {stage: sampled(folder, work, stage) for stage in (1, 3)},
        "streamed": {name: streamed(folder, work, lora) for name, lora in (("full", None), ("lora", LORA))},
        "resumed": {
            (stage, bool(lora)): resumed(folder, work, stage, lora)
            for stage, lora in ((2, None), (3, None), (3, LORA))
        },
    }
    if collectives.rank() == 0:
        torch.save(found, work / "found.pt")
    zero.stop()


def main(folder, work, other):
    forked.warm()
    for ended in forked.ranks(2, lambda: rank(folder, work, other), work, deadline=DEADLINE):
        assert ended.code == 0, ended.said


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
