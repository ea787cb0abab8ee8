"""What samples the trajectories of a run's rows: its environment, with the tokens and limits of the run."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from sdkit.batches import Completion, Row, SamplingParams, SamplingRequest
from sdkit.environments import continuous
from sdkit.environments.trajectories import TrajectorySampler
from sdkit.language.specs import StartsWith
from sdkit.serving.rollouts import LoadedServers
from sdkit.train.demonstrations import demonstrated_turns
from sdkit.train.models import Models
from sdkit.train.setup import RunSetup


def sample_on_servers(
    sampler: TrajectorySampler,
    rows: Sequence[Row],
    servers: LoadedServers,
    requests: Sequence[SamplingRequest],
    sampling: SamplingParams,
) -> list[Completion]:
    """Return one trajectory per request, in order, from rollout servers, as the environment's `scheduling` says.

    `rows` are the requests' rows.  Raises as the sampler does.
    """
    if sampler.spec.scheduling == "continuous":
        return continuous.sample_on_servers(
            sampler, servers, requests, rows, sampling, threads=sampler.spec.calls_at_once
        )
    return sampler.sample(servers, requests, rows, sampling)


def trajectory_sampler(
    setup: RunSetup,
    models: Models,
    sampling: SamplingParams,
    suite: str | None,
    *,
    all_ranks: bool = False,
    by_teacher: bool = False,
    starts_with: StartsWith | None = None,
) -> TrajectorySampler | None:
    """Return the sampler of trajectories for the training rows (None) or a suite; None if they have no environment.

    `all_ranks`: this rank samples the trajectories of all ranks.  `by_teacher`: the prompts are the teacher's.
    `starts_with`: as of this batch, without schedules.
    """
    data, spec = setup.data, setup.spec.environment
    environment = data.environments.get(suite)  # the panel has none
    if not spec or not environment or not data.observations:
        return None
    return TrajectorySampler(
        environment=environment,
        spec=spec,
        observations=data.observations.of,
        end_ids=models.end_ids,
        decode=partial(data.tokenizer.decode, skip_special_tokens=True),
        opened_prompt=partial(data.opened_prompt, by_teacher=by_teacher),
        demonstrated=partial(demonstrated_turns, data.completion_encoder, starts_with),
        all_ranks=all_ranks,
    )
