"""Runs on the pretended accelerator, in a process of its own; writes what became of each case to results.json.

`python accelerator_scenario.py MODEL_FOLDER WORK_FOLDER CASE…`; test_accelerator.py checks the results.  A case is the name
of a method page, or one of OTHERS or FAULTS below.
"""

import json
import os
import sys
import traceback
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
from attrs import evolve
from pretended_accelerator import DEVICE, choose, pretended, waits
from tinyruns import (
    SEES_DEMONSTRATION,
    advance,
    distil,
    make_spec,
    masters,
    rollout,
    rollouts_of,
    silent_console,
    teacher,
    train,
    train_step,
    training,
    with_evaluation,
)

import sdkit
from sdkit.batches import Tokens
from sdkit.checkpoints import checkpoint
from sdkit.language.load import load_spec
from sdkit.language.specs import (
    CopyWeights,
    EmaWeights,
    ExternalWeights,
    OutputSpec,
    RoutedWeights,
    ServedWeights,
    Table,
    TeacherSpec,
    TopKSupport,
)
from sdkit.models import tiny
from sdkit.models.teachers import AveragedTeacher
from sdkit.serving.tiny_server import TinyServer
from sdkit.train import collate, gradient_signal, loop, smoke
from sdkit.train.replay import open_recording
from sdkit.train.run import open_run

PAGES = Path(sdkit.__file__).parent / "methods"
STEPS = 2
EMA = teacher(EmaWeights(update_rate=0.3))
TOP = distil(support=TopKSupport(k=7, chosen_by="teacher", remainder="tail_bucket"))


def page(name):
    """`sdkit smoke` of a method page: gradient norms, and how often the host waited in the last optimizer step."""
    lines = smoke.smoke(load_spec(PAGES / f"{name}.yaml").spec, silent_console(), STEPS, PAGES)
    return {"norms": [line["grad_norm"] for line in lines if "grad_norm" in line]}


def resumed(folder, work):
    """The masters after three steps, and after a step from the checkpoint of the second."""
    spec = make_spec(folder, teacher=EMA)
    trainers = [open_run(spec, work) for _ in range(2)]
    advance(trainers[0], 2)
    saved = checkpoint.save(trainers[0].state, work, spec)
    checkpoint.load(trainers[1].state, saved, spec.training.seed)
    after = []
    for trainer in trainers:
        train_step(trainer, rollouts_of(trainer, 2))
        tensors = {**masters(trainer), **{f"teacher/{n}": t for n, t in trainer.models.teacher.state().items()}}
        after.append({name: _numbers(value) for name, value in tensors.items()})
        trainer.close()
    return {"same": after[0] == after[1], "tensors": len(after[0])}


def replayed(folder, work):
    """The losses of a run with evaluations and two updates a rollout batch, and of its replay from step 1."""
    spec = with_evaluation(
        make_spec(
            folder,
            teacher=teacher(CopyWeights(every=1)),
            training=training(steps=2, updates_per_rollout=2),
            output=OutputSpec(checkpoint_every=1, trackers=()),
        )
    )
    run = train(spec, work / "recorded")
    again = train(spec, work / "replayed", recording=open_recording(f"{run}@1"))
    return {"losses": [_losses(run), _losses(again)]}


def served(folder, work):
    """Losses and gradient norms with a served teacher, and with the same model in this process."""
    other = tiny.build(work / "other", seed=1)
    server = TinyServer(other, "big", max_logprobs=7)
    by_server = ServedWeights(url=server.url, model="big")
    local = ExternalWeights(path=str(other), dtype="float32")
    try:
        results = [_one_step(make_spec(folder, teacher=teacher(w), losses=TOP), work) for w in (by_server, local)]
    finally:
        server.close()
    return {"steps": results}


def routed(folder, work):
    """A step with three routes: a served model, another in this process, an average of the student."""
    other = tiny.build(work / "other", seed=1)
    server = TinyServer(other, "big", max_logprobs=7)
    routes = {
        "a": ServedWeights(url=server.url, model="big"),
        "b": ExternalWeights(path=str(other), dtype="float32"),
        "c": EmaWeights(update_rate=0.3),
    }
    weights = RoutedWeights(by="answer", routes=Table(routes))
    spec = make_spec(folder, teacher=TeacherSpec(weights=weights, sees=SEES_DEMONSTRATION), losses=TOP)
    rows = [Table({**row, "answer": "abc"[i % 3]}) for i, row in enumerate(spec.data.source.rows)]
    spec = evolve(spec, data=evolve(spec.data, source=evolve(spec.data.source, rows=tuple(rows))))
    try:
        return {"steps": [_one_step(spec, work)]}
    finally:
        server.close()


def tokens_on_the_host(patch, folder, work):
    patch(Tokens, "to", lambda self, device: self)
    _one_step(make_spec(folder), work)


def mask_on_the_host(patch, folder, work):
    pad = collate.pad_sequences

    def with_mask(*arguments):
        padded = pad(*arguments)
        mask = padded.attention_mask
        return evolve(padded, attention_mask=None if mask is None else mask.cpu())

    patch(collate, "pad_sequences", with_mask)
    _one_step(make_spec(folder, rollout=rollout(completions_per_prompt=2)), work)


def positions_on_the_host(patch, folder, work):
    pad = collate.pad_sequences

    def with_index(*arguments):
        padded = pad(*arguments)
        return evolve(padded, predictor_index=padded.predictor_index.cpu())

    patch(collate, "pad_sequences", with_index)
    _one_step(make_spec(folder), work)


def average_on_the_host(patch, folder, work):
    initialize = AveragedTeacher.initialize

    def elsewhere(self, *arguments):
        initialize(self, *arguments)
        self._write = lambda name, shadow: self.parameters[name].lerp_(shadow.cpu(), 1.0)

    patch(AveragedTeacher, "initialize", elsewhere)
    _one_step(make_spec(folder, teacher=EMA), work)


OTHERS = {"resumed": resumed, "replayed": replayed, "served": served, "routed": routed}
FAULTS = {
    fault.__name__: fault
    for fault in (tokens_on_the_host, mask_on_the_host, positions_on_the_host, average_on_the_host)
}


def _one_step(spec, work):
    trainer = open_run(spec, work)
    try:
        assert trainer.models.student.head.device == DEVICE
        result = train_step(trainer, rollouts_of(trainer))
    finally:
        trainer.close()
    return {name: result.metrics[name] for name in ("loss", "grad_norm")}


def _losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def _numbers(tensor):
    return tensor.float().cpu().numpy().tobytes().hex()


def _count_waits(steps):
    """Lists the waits of each optimizer step of a run in `steps`."""
    original = loop.train_step

    def counted(*arguments):
        waits.clear()
        result = original(*arguments)
        steps.append(dict(waits))
        return result

    loop.train_step = counted


def _result(name, folder, work, steps):
    waits.clear()
    steps.clear()
    try:
        with pretended(), pytest.MonkeyPatch.context() as patch:
            if name in FAULTS:
                FAULTS[name](patch.setattr, folder, work)
                result = {}
            else:
                result = OTHERS[name](folder, work) if name in OTHERS else page(name)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}", "where": traceback.format_exc(limit=-6)}
    return result | {"waits": {f"{kind}, {place}": n for (kind, place), n in (steps[-1] if steps else waits).items()}}


def main(folder, work, *names):
    choose()
    gradient_signal.record_gradient_norms = lambda student: []  # it would add waits of its own
    steps = []
    _count_waits(steps)
    results = {}
    for name in names:
        own = work / name
        own.mkdir()
        results[name] = _result(name, folder, own, steps)
        (work / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]), *sys.argv[3:])
