"""Samples completions for rows: with the student or the teacher, from the data set, or from prefetched batches."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import assert_never

from attrs import evolve, field, frozen

from sdkit.batches import Completion, RolloutBackend, Row, SamplingParams, SamplingRequest
from sdkit.data.logged_chats import CompletionEncoder
from sdkit.distributed import collectives
from sdkit.environments.continuous import sample_continuously
from sdkit.language.specs import (
    DatasetSamples,
    MixtureSamples,
    ReplayBackend,
    SampledBy,
    StartsWith,
    StudentSamples,
    TeacherSamples,
)
from sdkit.sampling.replay import ReplayRollouts
from sdkit.sampling.vllm import VllmRollouts
from sdkit.seeds import derive
from sdkit.serving.rollouts import ServerRollouts
from sdkit.serving.writer import WriterClient
from sdkit.stdout import Advance, no_progress
from sdkit.train.models import Models
from sdkit.train.prefetch import RolloutPrefetcher
from sdkit.train.rollout_backends import RolloutBackends
from sdkit.train.sampling_requests import Stream, group_numbers, sampling_params, sampling_requests
from sdkit.train.setup import RunSetup
from sdkit.train.step_specs import StepSpecs
from sdkit.train.trajectories import sample_on_servers, trajectory_sampler

OneSampler = StudentSamples | TeacherSamples | DatasetSamples
"""What writes the completions of one rollout batch."""


@frozen(eq=False, kw_only=True)
class SampledCompletions:
    """One completion per request, with the version of the weights that sampled and metrics of the sampling."""

    requests: tuple[SamplingRequest, ...]
    completions: Sequence[Completion]
    version: int  # policy version that sampled: its number of optimizer steps
    figures: Mapping[str, float] = field(factory=dict)
    seconds: Mapping[str, float] = field(factory=dict)


@frozen(eq=False, kw_only=True)
class RolloutSampler:
    """The sampling side of a run: its data, the models that may sample, the backends, and the writer of a context."""

    setup: RunSetup
    models: Models
    backends: RolloutBackends
    prefetcher: RolloutPrefetcher | None
    writer: WriterClient | None

    def start_engines(self) -> None:
        """Open the backends that sample from the student, so that no step waits for an engine to start."""
        sampled_by = self.setup.spec.rollout.sampled_by
        if not isinstance(sampled_by, DatasetSamples) and not sampled_by.uses_teacher_weights:
            self.backends.open(self.setup.plan.backend)
        if self.setup.spec.evaluation:
            self.backends.open(self.setup.plan.evaluation_backend)

    def sample(
        self,
        rows: Sequence[Row],
        stream: Stream,
        specs: StepSpecs,
        *,
        suite: str | None = None,
        advance: Advance = no_progress,
    ) -> SampledCompletions:
        """Sample the completions of this rank's rows, one group of them per row; `suite`: of held-out rows.

        `advance` as in `RolloutBackend`.
        """
        evaluation = suite is not None
        requests = sampling_requests(self.setup.data, rows, stream, suite)
        sampler = resolve_sampler(specs.sampled_by, self.setup.spec.training.seed, stream, evaluation=evaluation)
        if self.prefetcher and not evaluation:
            sampled = _take_prefetched(self.prefetcher, requests, int(stream[-1]), specs.optimizer_steps)
        else:
            sampled = self._sample_now(sampler, rows, requests, specs.optimizer_steps, suite, advance)
        if not isinstance(specs.sampled_by, MixtureSamples):
            return sampled
        return evolve(sampled, figures={**sampled.figures, "by_student": float(isinstance(sampler, StudentSamples))})

    def _sample_now(
        self,
        sampler: OneSampler,
        rows: Sequence[Row],
        requests: tuple[SamplingRequest, ...],
        version: int,
        suite: str | None,
        advance: Advance,
    ) -> SampledCompletions:
        rollout, evaluation = self.setup.spec.rollout, suite is not None
        groups = group_numbers(len(rows), rollout.completions_per_prompt)
        weights = self.models.student
        if evaluation or not isinstance(self.setup.plan.backend, ReplayBackend):  # a recording has every completion
            match sampler:
                case DatasetSamples(column=column):
                    completions = [self._dataset_completion(rows[group], column) for group in groups]
                    return SampledCompletions(requests=requests, completions=completions, version=version)
                case TeacherSamples(weights="teacher"):
                    weights = self.models.teacher_weights
                case StudentSamples() | TeacherSamples():
                    pass
                case _:
                    assert_never(sampler)
        backend, figures = self.backends.load(weights, version, evaluation=evaluation)
        sampling = sampling_params(rollout, self.models.ids_below)
        own_rows = [rows[group] for group in groups]
        start = sampler.starts_with if isinstance(sampler, StudentSamples) else None
        completions = self.complete(backend, requests, own_rows, sampling, suite, advance, starts_with=start)
        return SampledCompletions(requests=requests, completions=completions, version=version, figures=figures)

    def complete(
        self,
        backend: RolloutBackend,
        requests: Sequence[SamplingRequest],
        rows: Sequence[Row],
        sampling: SamplingParams,
        suite: str | None,
        advance: Advance = no_progress,
        *,
        by_teacher: bool = False,
        starts_with: StartsWith | None = None,
    ) -> list[Completion]:
        """Return one completion per request: a trajectory, if the spec has an environment.

        `rows` are the requests' rows, `by_teacher` says whether the prompts are the teacher's, `starts_with` (without
        schedules) which turns of a demonstration come first; a recording holds whole trajectories.  `advance` as in
        `RolloutBackend`.
        """
        trajectories = trajectory_sampler(
            self.setup, self.models, sampling, suite, by_teacher=by_teacher, starts_with=starts_with
        )
        if not trajectories or isinstance(backend, ReplayRollouts):
            return backend.sample(requests, sampling, advance)
        spec = trajectories.spec
        if spec.scheduling == "continuous" and isinstance(backend, ServerRollouts):
            # The first rank samples the trajectories of all ranks.
            of_all = evolve(trajectories, all_ranks=True)
            sample = partial(sample_on_servers, of_all, self._rows_of_all_ranks(rows, suite))
            return backend.sample(requests, sampling, advance, sample=sample)
        if spec.scheduling == "continuous" and isinstance(backend, VllmRollouts):
            threads = spec.calls_at_once
            return sample_continuously(
                trajectories, backend, requests, rows, sampling, threads=threads, advance=advance
            )
        return trajectories.sample(backend, requests, rows, sampling, advance)

    def _rows_of_all_ranks(self, rows: Sequence[Row], suite: str | None) -> list[Row]:
        """Return the rows of the requests of all ranks, in rank order, given this rank's."""
        data = self.setup.data
        by_index = {row.index: row for row in (data.train if suite is None else data.suites[suite])}
        parts = collectives.all_gather_object([row.index for row in rows])
        return [by_index[index] for part in parts for index in part]

    def _dataset_completion(self, row: Row, column: str) -> Completion:
        """Return the data set's completion with its end-of-turn tokens, cut at `rollout.max_new_tokens`."""
        logged = CompletionEncoder(self.setup.data.prompter, self.models.end_ids[0]).encode(row, column)
        limit = self.setup.spec.rollout.max_new_tokens
        kept = logged.cut(limit)
        return Completion(
            ids=kept.ids,
            logprobs=None,
            finished=len(logged.ids) <= limit,
            spans=kept.spans,
            ending=logged.ending(limit),
        )


def resolve_sampler(sampled_by: SampledBy, seed: int, stream: Stream, *, evaluation: bool) -> OneSampler:
    """Return what answers these prompts.  A mixture draws one for the batch, and is the student for held-out rows.

    Trajectories of held-out rows start with no demonstration.
    """
    if isinstance(sampled_by, StudentSamples) and evaluation:
        return StudentSamples()
    if not isinstance(sampled_by, MixtureSamples):
        return sampled_by
    coin = random.Random(derive(seed, *stream, "coin")).random()
    if evaluation or coin < sampled_by.student_share:
        return StudentSamples()
    return DatasetSamples(column=sampled_by.column)


def _take_prefetched(
    prefetcher: RolloutPrefetcher, requests: tuple[SamplingRequest, ...], step: int, version: int
) -> SampledCompletions:
    """Return the completions that the servers sampled for this step while earlier steps were trained on."""
    started = time.perf_counter()
    prefetcher.request(step, version)
    figures = {"sync_seconds": time.perf_counter() - started}
    batch = prefetcher.take(step)
    return SampledCompletions(
        requests=requests,
        completions=[batch.completions[r.prompt_ids, r.seed] for r in requests],
        version=batch.version,
        figures=figures | {**batch.figures, "staleness": float(version - batch.version)},
        seconds={"sampler": batch.seconds},
    )
