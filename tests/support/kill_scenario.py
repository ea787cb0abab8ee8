"""Runs that are killed by SIGKILL and resumed, each attempt in processes of its own.

`python kill_scenario.py MODEL_FOLDER WORK_FOLDER CASE…`: a case is TEACHER-FORM-STAGE-RANKS-PHASE@STEP,PHASE@STEP…, the
places where one attempt after the other is killed.  WORK_FOLDER/TEACHER-FORM-STAGE-RANKS is the run without a kill;
test_resume.py checks that the others equal it.
"""

import os
import signal
import sys
import traceback
from pathlib import Path

import forked
from attrs import evolve
from tinyruns import COLUMNS, LORA, QLORA, make_spec, model, rollout, rows, teacher, train, training, with_evaluation

from sdkit.checkpoints import atomic, checkpoint, manifest
from sdkit.distributed import zero
from sdkit.environments.file import UserEnvironment
from sdkit.environments.host import Host
from sdkit.language.specs import (
    CopyWeights,
    DataSpec,
    EmaWeights,
    FileEnvironment,
    FileReward,
    FrozenWeights,
    InlineSource,
    OptimizerSpec,
    OutputSpec,
    RoutedWeights,
    StudentWeights,
    Suite,
    Table,
    TransformersBackend,
    VllmBackend,
)
from sdkit.sampling.transformers import SeededSampler, TransformersRollouts
from sdkit.train import collect_rollouts, loop, run
from sdkit.train.report import Report
from sdkit.train.teacher_scores import TeacherScorer

STEPS = 6
EMA = EmaWeights(update_rate=0.3)
TEACHERS = {
    "student": StudentWeights(),
    "frozen": FrozenWeights(),
    "ema": EMA,
    "batch": EmaWeights(update_rate=0.3, every="rollout_batch"),
    "copy": CopyWeights(every=2),
    "routed": RoutedWeights(by="side", routes=Table({"left": EMA, "right": CopyWeights(every=3)})),
}
FORMS = {"full": None, "lora": LORA}
QUANTIZED, VLLM = "qlora", "vllm"
"""Two more forms: adapters over 4-bit weights; all weights are trained, and vLLM samples."""
PLAYED = "played"
"""One more form: all weights are trained, on trajectories of an environment whose processes write their ids to a file."""
PHASES = {
    # Where the kill comes: before or after this function, while the run's step is the case's.
    "rollout": (collect_rollouts, "score", "before"),
    "teacher": (TeacherScorer, "score_teacher", "after"),
    "update": (zero.Zero, "step", "after"),
    "boundary": (Report, "step", "after"),
    "evaluation": (loop, "evaluate", "after"),
    "save": (zero.Zero, "save", "after"),
    "manifest": (manifest, "write", "before"),
    "naming": (atomic, "replace_folder", "after"),
    "model": (checkpoint, "save_model", "after"),
}
IN_TRAJECTORIES = {
    # The kill comes in the second function, once the first was called twice in the step: in the second turn.
    "turn": (TransformersRollouts, "sample", SeededSampler, "__call__"),
    "environment": (UserEnvironment, "reply", Host, "_read"),
}
BY_THE_FIRST_RANK = {"manifest", "naming"}
REWARD = "import random\ndef drawn(completion, row): return random.random()\n"
PIDS = "pids"
GAME = """
import os, random

class Game:
    def __init__(self, pids):
        with open(pids, "a") as file:
            file.write(f"{os.getpid()}\\n")

    def reset(self, **columns): ...

    def reply(self, text):
        return f"{random.random()} is not {text}."
"""


def data_with_sides(count, start=0):
    sides = ("left", "right")
    tables = [Table({**row, "side": sides[i % 2]}) for i, row in enumerate(rows(count, start))]
    columns = Table({**COLUMNS, "side": "side"})
    return DataSpec(source=InlineSource(rows=tuple(tables)), columns=columns)


def spec_of(folder, work, weights, form, stage):
    (work / "reward.py").write_text(REWARD)
    # Draws from Python's global stream, of which a process has only one.
    drawn = FileReward(file=str(work / "reward.py"), function="drawn", at_once=1)
    backend = VllmBackend(kv_cache_gib=0.1) if form == VLLM else TransformersBackend()
    turns = {"max_new_tokens": 24, "stop": ("e",)} if form == PLAYED else {"max_new_tokens": 2}
    spec = make_spec(
        folder,
        model=model(folder, lora=QLORA if form == QUANTIZED else FORMS.get(form)),
        teacher=teacher(TEACHERS[weights]),
        data=data_with_sides(6),
        optimizer=OptimizerSpec(lr=3e-3, lr_scheduler_type="linear", warmup_steps=1),
        rollout=rollout(backend=backend, **turns),
        training=training(steps=STEPS, prompts_per_step=2, zero_stage=int(stage), updates_per_rollout=2),
        output=OutputSpec(checkpoint_every=2, trackers=()),
    )
    suite = Suite(data=data_with_sides(2, 100), score="drawn", loss_prompts=1)
    spec = with_evaluation(spec, every=3, teacher_lift=0, suites=Table({"held_out": suite}))
    return evolve(spec, rewards=Table({"drawn": drawn}), environment=game(work) if form == PLAYED else None)


def game(work):
    (work / "game.py").write_text(GAME)
    arguments = Table({"pids": str(work / PIDS)})
    return FileEnvironment(
        file=str(work / "game.py"), class_name="Game", arguments=arguments, max_turns=3, max_observation_tokens=16
    )


def arm(phase, at):
    """Kill this process in `phase` of step `at` (from 0), or right after that step for a phase between two steps."""
    step = remember_step()
    if phase in PHASES:
        owner, name, place = PHASES[phase]
        replace(owner, name, place, lambda: step() == at and kill())
        return
    owner, name, inner, inner_name = IN_TRAJECTORIES[phase]
    calls = []
    replace(owner, name, "before", lambda: step() == at and calls.append(None))
    replace(inner, inner_name, "before", lambda: len(calls) == 2 and kill())


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def remember_step():
    """Returns a function that returns the run's step; None before its first."""
    trainers = []
    evaluate_start = loop._evaluate_start

    def remember_trainer(trainer, *args):
        trainers.append(trainer)
        return evaluate_start(trainer, *args)

    loop._evaluate_start = remember_trainer
    return lambda: trainers[0].progress.step if trainers else None


def replace(owner, name, place, action):
    """Make a function call `action`, too, before or after what it does."""
    original = getattr(owner, name)

    def with_action(*args, **options):
        if place == "before":
            action()
        result = original(*args, **options)
        if place == "after":
            action()
        return result

    setattr(owner, name, with_action)


def kill_and_resume(spec, folder, ranks, places):
    for number, place in enumerate(places):
        phase, at = place.split("@")
        victim = 0 if phase in BY_THE_FIRST_RANK else number % ranks

        def attempt(phase=phase, at=int(at), victim=victim, resume=number > 0):
            if int(os.environ.get("RANK", "0")) == victim:
                arm(phase, at)
            train(spec, folder, resume=resume)

        results = forked.ranks(ranks, attempt, folder)
        killed = [rank for rank, each in enumerate(results) if each.code == -signal.SIGKILL]
        assert killed == [victim], f"{folder.name}: not killed {place}: {results}"
        assert all(each.code for each in results), f"{folder.name}: {place} outlived: {results}"
    run_to_end(lambda: train(spec, folder, resume=True), folder, ranks)


def run_to_end(attempt, folder, ranks):
    for each in forked.ranks(ranks, attempt, folder):
        assert each.code == 0, f"{folder.name}: {each.output}"


def run_cases(folder, work, cases):
    for case in cases:
        weights, form, stage, ranks, places = case.split("-")
        spec = spec_of(folder, work, weights, form, stage)
        straight = work / f"{weights}-{form}-{stage}-{ranks}"
        if not straight.exists():
            run_to_end(lambda s=spec, f=straight: train(s, f), straight, int(ranks))
        kill_and_resume(spec, work / case, int(ranks), places.split(","))


def main(folder, work, *cases):
    """Two one-rank cases run at a time, like two ranks."""
    forked.warm()
    run.plot = lambda *_: None  # the plots are not compared
    work = Path(work)
    alone = [case for case in cases if case.split("-")[3] == "1"]
    halves = [os.fork() or _half(folder, work, alone[start::2]) for start in (0, 1)]
    ended = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in halves]
    assert ended == [0, 0]
    run_cases(folder, work, [case for case in cases if case not in alone])


def _half(folder, work, cases):
    """In a process of its own."""
    try:
        run_cases(folder, work, cases)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
