"""Runs whose number of ranks changes between two steps.

`python convert_scenario.py MODEL_FOLDER WORK_FOLDER CASE…`: a case is TEACHER-FORM-STAGE-RANKS.  WORK_FOLDER/CASE has the
run with that many ranks from end to end, `straight`, and three that branch off: after the second step `back` is converted
for `OTHER` ranks and back again, and continues; `other` is converted after the second step and continues to the end; and
`again` is converted back after `other`'s fourth step.  test_convert.py checks the results.
"""

import shutil
import sys
from pathlib import Path

import forked
from attrs import evolve
from ranks_scenario import EMA, LIVE, ONE, small
from tinyruns import LORA, QLORA, train

from sdkit.checkpoints.convert import convert
from sdkit.distributed import zero_shards
from sdkit.language.specs import CopyWeights, OptimizerSpec, OutputSpec, RoutedWeights, Table
from sdkit.train import run

STEPS, PROMPTS = 7, 6
OTHER = {2: 1, 3: 2}
"""The other number of ranks.  Three do not divide every parameter."""
COPY = CopyWeights(every=3)
TEACHERS = {
    "student": LIVE,
    "ema": EMA,
    "copy": COPY,
    "routed": RoutedWeights(by="topic", routes=Table({"a": EMA, "b": COPY, "c": LIVE})),
}
FORMS = {
    "full": {},
    "lora": {"lora": LORA},
    "qlora": {"lora": QLORA},
    "bfloat16": {"dtype": "bfloat16"},
    "offloaded": {"offload": ("optimizer",)},
}
# As in ranks_scenario, no step is a gradient's sign alone; but here its second moment has a say, too.
# Norms are not decayed, so there are two groups of parameters.
SMOOTH = OptimizerSpec(
    lr=3e-2, eps=1.0, max_grad_norm=1.0, lr_scheduler_type="linear", warmup_steps=1, weight_decay=1.0
)
PARTS = 20_000
"""Elements after which stage 3 begins a further part of the optimizer's state: of large models there are several."""


def spec_of(folder, weights, form, stage):
    spec = small(folder, TEACHERS[weights], int(stage), ONE, **FORMS[form])
    return evolve(
        spec,
        optimizer=SMOOTH,
        training=evolve(spec.training, steps=STEPS, prompts_per_step=PROMPTS),
        output=OutputSpec(checkpoint_every=2, keep_checkpoints=9, trackers=()),
    )


def copy_up_to_step(run, target, step):
    """Copy a run as it was at `step`, without later checkpoints."""
    shutil.copytree(run, target)
    for checkpoint in (target / "checkpoints").glob("step_*"):
        if checkpoint.name > f"step_{step:06d}":
            shutil.rmtree(checkpoint)


def main(folder, work, *cases):
    forked.warm()
    run.plot = lambda *_: None  # a picture of each run would be a quarter of the time
    settings = zero_shards.settings
    zero_shards.settings = lambda offload: settings(offload) | {"sub_group_size": PARTS}
    for case in cases:
        weights, form, stage, ranks = case.split("-")
        both = int(ranks), OTHER[int(ranks)]
        all_runs(spec_of(folder, weights, form, stage), Path(work) / case, *both)


def all_runs(spec, work, ranks, other):
    work.mkdir()

    def run_ranks(count, function):
        for result in forked.ranks(count, function, work):
            assert result.code == 0, f"{work.name}: {result.output}"

    def convert_to(name, *counts):
        for count in counts:
            run_ranks(1, lambda count=count: convert(spec, work / name, count, print))

    run_ranks(ranks, lambda: train(spec, work / "straight"))
    for name, source, step, counts in (
        ("back", "straight", 2, (other, ranks)),
        ("other", "straight", 2, (other,)),
        ("again", "other", 4, (ranks,)),
    ):
        copy_up_to_step(work / source, work / name, step)
        convert_to(name, *counts)
        run_ranks(counts[-1], lambda name=name: train(spec, work / name, resume=True))


if __name__ == "__main__":
    main(*sys.argv[1:])
