"""Several ranks: small runs under every ZeRO stage, to be compared with one plain process.

`python ranks_scenario.py MODEL_FOLDER WORK_FOLDER OTHER_MODEL` runs two ranks; the first one writes the results to
WORK_FOLDER/results.pt.  test_ranks.py checks them.
"""

import shutil
import sys
from pathlib import Path
from unittest import mock

import forked
import torch
from attrs import evolve
from tinyruns import (
    LORA,
    MINUS_GRADIENT,
    collect,
    distil,
    held_out_loss,
    make_spec,
    model,
    rollout,
    rollouts_of,
    teacher,
    train_step,
    training,
    with_evaluation,
)
from torch.nn import functional

from sdkit.batches import SamplingRequest
from sdkit.checkpoints import checkpoint
from sdkit.distributed import collectives, zero, zero_loading, zero_shards
from sdkit.language.errors import BadData
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
from sdkit.models.activation_checkpointing import RecomputedForward
from sdkit.train.collect_rollouts import rollout_records, sort_records
from sdkit.train.evaluate import evaluate, teacher_lift
from sdkit.train.run import open_run
from sdkit.train.sampling_requests import sampling_params

DEADLINE = 400.0  # seconds
STEPS, PROMPTS = 3, 4
# With eps far above every gradient, Adam is plain momentum: no step depends on a gradient's sign alone.
# Norms are not decayed, so there are two groups of parameters.
SMOOTH = OptimizerSpec(lr=3e2, eps=1e4, max_grad_norm=1.0, weight_decay=1e-4)
EMA, COPY, FROZEN, LIVE = (EmaWeights(update_rate=0.3), CopyWeights(every=2), FrozenWeights(), StudentWeights())
ONE, SEVERAL = 8192, 100
"""Padded tokens of a micro-batch: all rollouts of a rank, or one or two."""


def completion(i):
    """Completions of unequal lengths.  In the second step, the mask leaves no token of every second row (one of two ranks)."""
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
    """A run on the data set's completions, so that rounding cannot change the tokens that it trains on."""
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
    """Settings by name: teachers with their other settings, for any stage and number of ranks."""
    external = ExternalWeights(path=str(other), dtype="float32")
    routed = RoutedWeights(by="topic", routes=Table({"a": EMA, "b": external, "c": LIVE}))
    anchor = Table({"near": ReferenceKl(estimator="vocabulary", coefficient=0.5)})
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
            "losses": Table({**distil(), **anchor}),
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


RESUMED = [
    (2, None, "float32"),
    (2, None, "bfloat16"),
    (2, LORA, "bfloat16"),
    (3, None, "float32"),
    (3, LORA, "float32"),
]
"""ZeRO stage, adapters, dtype."""


def full_parameter(engine, parameter, shard):
    """The full parameter, from the shards of all ranks."""
    if not engine.shards_masters:
        return shard.clone().view_as(parameter) if engine.stage < 3 else shard.clone().view(parameter.ds_shape)
    shape = getattr(parameter, "ds_shape", parameter.shape)
    joined = torch.cat(collectives.all_gather_object(shard.clone()))
    return joined[: shape.numel()].view(shape)


def train_run(spec, work):
    """Losses, norms, distances, masters and the teacher's average after three updates."""
    trainer = open_run(spec, work)
    results = {"loss": [], "grad_norm": [], "distance": [], "micro_batches": []}
    for step in range(STEPS):
        step_result = train_step(trainer, rollouts_of(trainer, step))
        for name in ("loss", "grad_norm"):
            results[name].append(step_result.metrics[name])
        results["distance"].append(step_result.metrics.get("teacher_distance", 0.0))
    results |= weights_of(trainer)
    shadows = [shadow for part in trainer.models.teacher.leaves if part.moves for shadow in part.shadow.values()]
    results["own_shadow"] = collectives.all_gather_object(sum(shadow.numel() for shadow in shadows))
    results["complete"] = collectives.all_gather_object(teacher_is_complete(trainer, results["shadow"]))
    trainer.close()
    return results


def weights_of(trainer):
    own = {n.removeprefix("model."): p for n, p in trainer.learner.zero.named}
    engine = trainer.learner.zero
    weights = {"masters": {n: full_parameter(engine, own[n], v) for n, v in trainer.learner.masters()}}
    parts = [part for part in trainer.models.teacher.leaves if part.moves]
    weights["shadow"] = {
        n: full_parameter(engine, part.parameters[n], v) for part in parts for n, v in part.shadow.items()
    }
    return weights


def teacher_is_complete(trainer, shadow):
    """Whether this rank's teacher has every rank's part of the average, in the model's dtype."""
    if trainer.learner.zero.stage == 3:
        return True
    parts = [part for part in trainer.models.teacher.leaves if part.moves]
    pairs = [(p, shadow[name]) for part in parts for name, p in part.parameters.items()]
    return all(torch.equal(parameter.detach(), value.to(parameter.dtype)) for parameter, value in pairs)


def train_checkpointed(folder, work, stage):
    """Three updates with activation checkpointing, and how often the student's blocks ran in them."""
    spec = small(folder, stage=stage)
    trainer = open_run(evolve(spec, model=evolve(spec.model, activation_checkpointing=True)), work)
    forwards = [m.forward for m in trainer.models.student.model.modules() if isinstance(m.forward, RecomputedForward)]
    start = sum(forward.runs for forward in forwards)
    steps = [train_step(trainer, rollouts_of(trainer, step)) for step in range(STEPS)]
    results = {name: [step.metrics[name] for step in steps] for name in ("loss", "grad_norm")}
    results["distance"] = [step.metrics["teacher_distance"] for step in steps]
    results |= weights_of(trainer) | {"runs": sum(forward.runs for forward in forwards) - start}
    trainer.close()
    return results


def train_with_a_skipped_step(folder, work, stage):
    """A gradient that is not finite on the last rank alone, then a good step."""
    trainer = open_run(small(folder, stage=stage), work)
    before = weights_of(trainer)
    _, parameter = trainer.learner.zero.named[0]
    last = collectives.rank() == collectives.world_size() - 1
    spoiled = parameter.register_hook(lambda g: g * float("nan") if last else g)
    bad = train_step(trainer, rollouts_of(trainer, 0))
    spoiled.remove()
    after = weights_of(trainer)
    good = train_step(trainer, rollouts_of(trainer, 0))
    trainer.close()
    same = all(torch.equal(v, after[kind][n]) for kind in ("masters", "shadow") for n, v in before[kind].items())
    return {"applied": [bad.applied, good.applied], "unchanged": same}


def sample_and_evaluate(folder, work, stage):
    """Rollouts, evaluations, and completions that end at other lengths on each rank."""
    spec = make_spec(
        folder,
        teacher=teacher(EMA),
        rollout=rollout(completions_per_prompt=2, max_new_tokens=6, backend=TransformersBackend(batch_size=3)),
        training=training(zero_stage=stage),
    )
    trainer = open_run(with_evaluation(spec, teacher_lift=3), work)
    collected = collect(trainer, 0)
    backend, _ = trainer.sampler.backends.load(trainer.models.student, trainer.progress.optimizer_steps)
    ids = trainer.setup.data.student_ids(trainer.setup.data.train[0])
    limit = 2 + 7 * collectives.rank() if collectives.world_size() > 1 else 9
    settings = evolve(sampling_params(trainer.setup.spec.rollout, trainer.models.ids_below), max_new_tokens=limit)
    requests = [SamplingRequest(prompt_ids=ids, seed=5)] * (1 + 4 * (collectives.rank() == 0))
    completion_ids = [c.ids for c in backend.sample(requests, settings)]
    evaluation = trainer.setup.spec.evaluation
    held_out = evaluate(trainer.sampler, evaluation, trainer.progress.optimizer_steps)
    lift = teacher_lift(trainer.sampler, evaluation, held_out, trainer.specs)
    results = {
        "rollouts": sort_records(collectives.gather_object(rollout_records(collected))),
        "unequal": collectives.all_gather_object(completion_ids),
        "scores": held_out.scores,
        "records": held_out.records,
        "lift": {key: lift.interval(key).mean for key in lift.pairs},
        "held out": held_out_loss(trainer),
    }
    trainer.close()
    return results


def stream_tensors(folder, work, lora):
    """The tensors of student and teacher, and the largest share of the model that was gathered at once."""
    trainer = open_run(small(folder, stage=3, lora=lora), work)
    train_step(trainer, rollouts_of(trainer, 0))
    every = list(trainer.models.student.model.parameters())
    results = {}
    for who, weights in (("student", trainer.models.student), ("teacher", trainer.models.teacher.weights)):
        peak, tensors = 0, {}
        for name, tensor in weights.named_tensors():
            peak = max(peak, sum(p.numel() for p in weights.model.parameters()))
            tensors[name] = tensor.clone()
        results[who] = tensors
        results[f"{who} gathered"] = peak / sum(p.ds_numel for p in every)
    results["gathered at end"] = sum(p.numel() for p in every)
    trainer.close()
    return results


def save_and_resume(folder, work, stage, lora, dtype):
    """Two updates and a checkpoint; a third update, and the same one after loading the checkpoint."""
    spec = small(folder, stage=stage, lora=lora, dtype=dtype)
    run_folder = work / f"resumed-{stage}-{bool(lora)}-{dtype}"
    trainer = open_run(spec, work)
    for step in range(2):
        train_step(trainer, rollouts_of(trainer, step))
    trainer.progress.step = 2
    saved = checkpoint.save(trainer.state, run_folder, trainer.setup.spec)
    train_step(trainer, rollouts_of(trainer, 2))
    straight = weights_of(trainer)
    trainer.close()
    trainer = open_run(spec, work)
    checkpoint.load(trainer.state, saved, trainer.setup.spec.training.seed)
    train_step(trainer, rollouts_of(trainer, 2))
    again = weights_of(trainer)
    trainer.close()
    return {"straight": straight, "again": again}


def open_sharded(folder, work, other):
    """What a rank reads, and the largest share of all parameters that it holds at once while models are sharded."""
    import deepspeed.comm

    reads, opened, peak = [], [], 0
    read, shard, broadcast = zero_loading.read_weights, zero_loading.shard, deepspeed.comm.broadcast

    def count_read(spec, located):
        reads.append(located)
        return read(spec, located)

    def remember(weights, *rest):
        opened.append(weights.model)
        shard(weights, *rest)

    def watch(tensor, *rest, **more):
        nonlocal peak
        parameters = [p for module in opened for p in module.parameters()]
        total = sum(zero_shards.ShardedParameters().full_shape(p).numel() for p in parameters)
        peak = max(peak, sum(p.numel() for p in parameters if not p.is_meta) / total)
        return broadcast(tensor, *rest, **more)

    patches = (
        mock.patch.object(zero_loading, "read_weights", count_read),
        mock.patch.object(zero_loading, "shard", remember),
        mock.patch.object(deepspeed.comm, "broadcast", watch),
    )
    with patches[0], patches[1], patches[2]:
        routed = RoutedWeights(
            by="topic", routes=Table({"a": EMA, "b": ExternalWeights(path=str(other)), "c": FROZEN})
        )
        open_run(small(folder, stage=3, weights=routed), work).close()
    return collectives.all_gather_object({"reads": len(reads), "models": len(opened), "peak": peak})


def count_gathers(folder, work, share):
    """All-gathers of the second and third update, and the weights after them; small parameters are at most this share."""
    from deepspeed.runtime.zero import partition_parameters

    counts, gather = [], partition_parameters._dist_allgather_fn

    def count(*args):
        counts[-1] += 1
        return gather(*args)

    with (
        mock.patch.object(zero_shards, "SMALL_SHARE", share),
        mock.patch.object(partition_parameters, "_dist_allgather_fn", count),
    ):
        counts.append(0)
        trainer = open_run(small(folder, stage=3, lora=LORA), work)
        for step in range(STEPS):
            batch = rollouts_of(trainer, step)
            counts.append(0)
            train_step(trainer, batch)
        counts.append(0)
        weights = weights_of(trainer)
        trainer.close()
    return {"gathers": counts[2 : 1 + STEPS], "weights": weights}


def read_damaged_weights(folder, work):
    """The error of each rank where the first one cannot read the weights."""
    damaged = work / "damaged"
    if collectives.rank() == 0:
        shutil.copytree(folder, damaged)
        (damaged / "model.safetensors").write_bytes(b"damaged")
    collectives.barrier()
    try:
        zero_loading.read_on_first_rank(model(damaged), str(damaged))
    except BadData as error:
        return collectives.all_gather_object(str(error))
    return []


def reduction_error(stage, reduce_dtype):
    """Relative error of the sum over ranks and micro-batches of a bfloat16 model's gradients."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 64, bias=False).bfloat16()
    start = linear.weight.detach().float().flatten()
    engine = zero.Zero(
        zero_shards.Root(linear), MINUS_GRADIENT, stage, True, zero.ZeroOptions(reduce_dtype=reduce_dtype)
    )

    def loss(x, weight=None):
        return functional.linear(x, linear.weight if weight is None else weight).float().square().sum() / 1e4

    own = torch.zeros(64, 64)
    generator = torch.Generator().manual_seed(collectives.rank())
    for _ in range(4):
        x = torch.randn(64, 64, generator=generator).bfloat16()
        weight = start.view(64, 64).bfloat16().requires_grad_()
        loss(x, weight).backward()
        own += weight.grad.float()
        engine.backward(engine.forward(loss, x))
    engine.step(MINUS_GRADIENT.lr)
    ((_, shard),) = engine.masters()
    exact = collectives.all_reduce_sum(own).flatten()
    summed = start - torch.cat(collectives.all_gather_object(shard.clone()))
    engine.close()
    return ((summed - exact).norm() / exact.norm()).item()


def run_rank(folder, work, other):
    zero.start()
    settings = kinds(other)
    results = {
        "trained": {
            (name, stage, budget): train_run(small(folder, stage=stage, budget=budget, **settings[name]), work)
            for name, stage, budget in ON_TWO_RANKS
        },
        "checkpointed": {stage: train_checkpointed(folder, work, stage) for stage in (2, 3)},
        "offloaded": train_run(small(folder, stage=3, offload=("optimizer", "parameters")), work),
        "bfloat16": {stage: train_run(small(folder, stage=stage, dtype="bfloat16"), work) for stage in (1, 2, 3)},
        "skipped": {stage: train_with_a_skipped_step(folder, work, stage) for stage in (0, 2, 3)},
        "sampled": {stage: sample_and_evaluate(folder, work, stage) for stage in (1, 3)},
        "streamed": {name: stream_tensors(folder, work, lora) for name, lora in (("full", None), ("lora", LORA))},
        "resumed": {case: save_and_resume(folder, work, *case) for case in RESUMED},
    }
    results["sharded"] = open_sharded(folder, work, other)
    results["reduced"] = {
        (stage, dtype): reduction_error(stage, dtype) for stage in (1, 2, 3) for dtype in ("float32", "bfloat16")
    }
    results["gathers"] = {share: count_gathers(folder, work, share) for share in (0.0, zero_shards.SMALL_SHARE)}
    results["damaged"] = read_damaged_weights(folder, work)
    if collectives.rank() == 0:
        torch.save(results, work / "results.pt")
    zero.stop()


def main(folder, work, other):
    forked.warm()
    for result in forked.ranks(2, lambda: run_rank(folder, work, other), work, deadline=DEADLINE):
        assert result.code == 0, result.output


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
