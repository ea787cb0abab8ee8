"""Describes the processes of a run: who trains, samples, scores and writes."""

from __future__ import annotations

from collections.abc import Iterator

from sdkit.language.errors import counted, listed
from sdkit.language.specs import (
    Backend,
    DatasetSamples,
    ExperimentSpec,
    MathVerifyReward,
    PythonTests,
    RewardModel,
    VllmBackend,
    VllmServerBackend,
)
from sdkit.plan.accelerators import Machine


def describe_processes(spec: ExperimentSpec, backend: Backend, machine: Machine) -> tuple[str, ...]:
    """Returns one line for each kind of process of a run."""
    return tuple(_lines(spec, backend, machine))


def _lines(spec: ExperimentSpec, backend: Backend, machine: Machine) -> Iterator[str]:
    ranks = machine.ranks
    rollouts = spec.training.prompts_per_step // ranks * spec.rollout.completions_per_prompt
    place = "" if machine.on_cpu else ", each on its own GPU" if ranks > 1 else ", on one GPU"
    start = f", started by `--processes {ranks}` or `torchrun`" if ranks > 1 else ""
    yield f"{counted(ranks, 'rank trains', 'ranks train')}{place}{start}; the first writes the run directory"
    if isinstance(spec.rollout.sampled_by, DatasetSamples):
        yield f"rollouts: {counted(rollouts, 'completion')} of the data set for each rank and step"
    elif isinstance(backend, VllmServerBackend):
        yield f"rollouts: servers at {listed(backend.urls)}, each started by `sdkit serve`; the first rank sends the prompts"
    else:
        how = (
            "its own vLLM engine, in the same process" if isinstance(backend, VllmBackend) else "the training weights"
        )
        yield f"rollouts: each rank samples {counted(rollouts, 'completion')} a step with {how}"
    for _, teacher in spec.served_teachers():
        yield f"teacher: the server at {teacher.url}, {teacher.requests_at_once} requests at once from each rank"
    if writer := spec.writer:
        yield (
            f"writer: the server at {writer.url}, asked once about each completion, {writer.requests_at_once} requests at "
            "once from each rank"
        )
    for name, reward in spec.rewards.items():
        match reward:
            case MathVerifyReward() | PythonTests():
                yield f"reward {name}: worker processes of each rank, on its CPU cores"
            case RewardModel():
                yield f"reward {name}: the model {reward.path}, loaded by each rank (not in the memory below)"
            case _:
                pass
