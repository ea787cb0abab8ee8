"""vLLM beside a trainer under ZeRO stage 3, once a rank: writes the figures of each weight transfer as JSON.

`python vllm_ranks_scenario.py MODEL_FOLDER WORK_FOLDER [RANKS_PER_ENGINE]`; test_ranks.py checks them.
"""

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from tinyruns import LORA, advance, collect, make_spec, model, rollout, teacher, training

from sdkit.distributed import collectives, zero
from sdkit.language.specs import EmaWeights, OptimizerSpec, VllmBackend
from sdkit.train.collect_rollouts import rollout_records, sort_records
from sdkit.train.run import open_run


def main(folder, work, ranks_per_engine):
    spec = make_spec(
        folder,
        model=model(folder, lora=LORA),
        teacher=teacher(EmaWeights(update_rate=0.3)),
        rollout=rollout(temperature=0.7, backend=VllmBackend(kv_cache_gib=0.1, tensor_parallel_size=ranks_per_engine)),
        optimizer=OptimizerSpec(lr=1e-2),
        training=training(zero_stage=3),
    )
    trainer = open_run(spec, work)
    every = list(trainer.models.student.model.parameters())
    total = sum(p.ds_numel for p in every)
    gathered_counts = record_gathered(trainer.models.student, every)
    figures = []
    for step in range(3):
        collected = collect(trainer, step)
        if step == 0:  # a collective: every rank takes part, or none
            records = sort_records(collectives.gather_object(rollout_records(collected)))
        figures.append(collected.figures)
        advance(trainer, 1)
    figures.append(trainer.sampler.backends.load(trainer.models.student, trainer.progress.optimizer_steps)[1])
    figures.append(trainer.sampler.backends.load(trainer.models.teacher.weights, trainer.progress.optimizer_steps)[1])
    results = {
        "syncs": collectives.all_gather_object([f["canary_mean"] for f in figures]),
        "local ranks": collectives.all_gather_object(local_rank(trainer)),
        "peak": max(gathered_counts) / total,
        "gathered at end": sum(p.numel() for p in every),
        "rollouts": len(records),
        "tokens": [record["completion_ids"] for record in records],
        "ranks": collectives.world_size(),
    }
    first = collectives.rank() == 0
    trainer.close()
    zero.stop()
    if first:
        (work / "results.json").write_text(json.dumps(results))


def local_rank(trainer):
    """Returns the local rank of this rank's engine, which is the index of its GPU."""
    backend = trainer.sampler.backends.open(trainer.setup.plan.backend)
    return backend.engine.collective_rpc(lambda worker: worker.local_rank)[0]


def record_gathered(weights, every):
    """Returns a list that receives the number of gathered elements at each tensor sent to vLLM."""
    counts, stream = [], weights.named_tensors

    def tensors():
        for pair in stream():
            counts.append(sum(p.numel() for p in every))
            yield pair

    weights.named_tensors = tensors
    return counts


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 1)
