"""Runs that are killed by SIGKILL and taken up again, each attempt in a process of its own.

`python kill_scenario.py MODEL_FOLDER WORK_FOLDER CASE…`: a case is TEACHER-FORM-STAGE-PHASE@STEP,PHASE@STEP…, the places
where one attempt after the other is killed.  Every attempt is forked from here, where all that is slow to import is imported
already.  WORK_FOLDER/TEACHER-FORM-STAGE is the run that nobody killed; test_resume.py says that the others must be the same.
"""

import os
import signal
import sys
from pathlib import Path

from attrs import evolve
from tinyruns import LORA, evaluated, inline, make_spec, model, rollout, teacher, train, training

from sdkit.components.rollouts import TransformersRollouts
from sdkit.engine import checkpoint, loop, manifest, plot, step, zero
from sdkit.engine.report import Report
from sdkit.specs import (
    CopyWeights,
    EmaWeights,
    FileReward,
    FrozenWeights,
    OptimizerSpec,
    OutputSpec,
    StudentWeights,
    Suite,
    Table,
)

STEPS = 6
TEACHERS = {
    "student": StudentWeights(),
    "frozen": FrozenWeights(),
    "ema": EmaWeights(update_rate=0.3),
    "copy": CopyWeights(every=2),
}
FORMS = {"full": None, "lora": LORA}
PHASES = {
    # Where the kill comes: before or after this function, while the run's step is the case's.
    "rollout": (TransformersRollouts, "sample", "after"),
    "teacher": (step, "score", "after"),
    "update": (zero.Zero, "step", "after"),
    "boundary": (Report, "step", "after"),
    "evaluation": (loop, "evaluate", "after"),
    "save": (zero.Zero, "save", "after"),
    "manifest": (manifest, "write", "before"),
    "naming": (checkpoint, "_put", "after"),
}
REWARD = "import random\ndef drawn(completion, row): return random.random()\n"


def spec_of(folder, work, weights, form, stage):
    (work / "reward.py").write_text(REWARD)
    # Drawn from Python's own stream, which every process has but one of.
    drawn = FileReward(file=str(work / "reward.py"), function="drawn", at_once=1)
    spec = make_spec(
        folder,
        model=model(folder, lora=FORMS[form]),
        teacher=teacher(TEACHERS[weights]),
        optimizer=OptimizerSpec(lr=3e-3, schedule="linear", warmup_steps=1),
        rollout=rollout(max_new_tokens=4),
        training=training(
            steps=STEPS, prompts_per_step=2, zero_stage=int(stage), updates_per_rollout=2
        ),
        output=OutputSpec(checkpoint_every=2, tensorboard=False),
    )
    suite = Suite(data=inline(2, 100), score="drawn", loss_prompts=1)
    spec = evaluated(spec, every=3, teacher_lift=0, suites=Table({"held": suite}))
    return evolve(spec, rewards=Table({"drawn": drawn}))


def arm(phase, at):
    """End this process in a phase of its step number `at`, counted from 0; after it, for what stands between steps."""
    owner, name, place = PHASES[phase]
    worlds = []
    opened = loop._begin

    def begin(world, *args):
        worlds.append(world)
        return opened(world, *args)

    loop._begin = begin
    whole = getattr(owner, name)

    def deadly(*args, **options):
        found = whole(*args, **options) if place == "after" else None
        if worlds and worlds[0].step == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(*args, **options) if place == "before" else found

    setattr(owner, name, deadly)


def attempt(run):
    """`run` in a process of its own; how that ended."""
    child = os.fork()
    if child == 0:
        try:
            run()
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_and_resumed(spec, folder, places):
    for number, place in enumerate(places):
        phase, at = place.split("@")

        def deadly(phase=phase, at=int(at), resume=number > 0):
            arm(phase, at)
            train(spec, folder, resume=resume)

        ended = attempt(deadly)
        assert ended == -signal.SIGKILL, f"{folder.name}: not killed {place}, ended with {ended}"
    assert attempt(lambda: train(spec, folder, resume=True)) == 0, folder.name


def main(folder, work, *cases):
    assert callable(plot.plot)
    zero.prepare()
    import deepspeed
    import matplotlib.pyplot
    import peft
    import transformers.models.llama.modeling_llama

    assert all((deepspeed, matplotlib.pyplot, peft, transformers.models.llama.modeling_llama))
    work = Path(work)
    for case in cases:
        weights, form, stage, places = case.split("-")
        spec = spec_of(folder, work, weights, form, stage)
        straight = work / f"{weights}-{form}-{stage}"
        if not straight.exists():
            assert attempt(lambda s=spec, f=straight: train(s, f)) == 0, straight.name
        killed_and_resumed(spec, work / case, places.split(","))


if __name__ == "__main__":
    main(*sys.argv[1:])
