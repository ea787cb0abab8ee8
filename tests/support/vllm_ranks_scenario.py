"""vLLM beside a trainer under ZeRO stage 3, on two ranks: the first one writes the figures to WORK_FOLDER/found.json.

`python vllm_ranks_scenario.py MODEL_FOLDER WORK_FOLDER`; test_ranks.py says what they must be.
"""

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import forked
from tinyruns import LORA, advance, collect, make_spec, model, rollout, teacher, training

from sdkit.distributed import collectives, zero
from sdkit.language.specs import EmaWeights, OptimizerSpec, VllmBackend
from sdkit.train.collect_rollouts import rollout_records, sort_records
from sdkit.train.run import open_run

DEADLINE = 400.0  # seconds


def rank(folder, work):
    spec = make_spec(
        folder,
        model=model(folder, lora=LORA),
        teacher=teacher(EmaWeights(update_rate=0.3)),
        rollout=rollout(temperature=0.7, backend=VllmBackend(kv_cache_gib=0.1)),
        optimizer=OptimizerSpec(lr=1e-2),
        training=training(zero_stage=3),
    )
    world = open_run(spec, work)
    every = list(world.models.student.model.parameters())
    whole = sum(p.ds_numel for p in every)
    most = watched(world.models.student, every)
    figures = []
    for step in range(3):
        gathered = collect(world, step)
        if step == 0:  # a collective: every rank takes part, or none
            rolled = sort_records(collectives.gather_object(rollout_records(gathered)))
        figures.append(gathered.figures)
        advance(world, 1)
    figures.append(world.sampler.backends.load(world.models.student, world.progress.optimizer_steps)[1])
    figures.append(world.sampler.backends.load(world.models.teacher.weights, world.progress.optimizer_steps)[1])
    found = {
        "syncs": collectives.all_gather_object([f["canary_mean"] for f in figures]),
        "most": max(most) / whole,
        "left whole": sum(p.numel() for p in every),
        "rollouts": len(rolled),
        "ranks": collectives.world_size(),
    }
    first = collectives.rank() == 0
    world.close()
    zero.stop()
    if first:
        (work / "found.json").write_text(json.dumps(found))


def watched(weights, every):
    """How many elements are whole at each tensor that goes out."""
    seen, stream = [], weights.named_tensors

    def tensors():
        for pair in stream():
            seen.append(sum(p.numel() for p in every))
            yield pair

    weights.named_tensors = tensors
    return seen


def main(folder, work):
    forked.warm()
    for ended in forked.ranks(2, lambda: rank(folder, work), work, deadline=DEADLINE):
        assert ended.code == 0, ended.said


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
