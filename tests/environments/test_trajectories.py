"""Trajectories: exact tokens, what is trained, one turn as without an environment, recordings."""

from io import StringIO

import pytest
import torch
from attrs import evolve
from rich.console import Console
from tinyruns import (
    collect,
    lines,
    make_spec,
    metrics,
    prepare_rollouts,
    rollout,
    train,
    training,
    weights_of,
    with_evaluation,
)

from sdkit.distributed import collectives
from sdkit.language.specs import CrossEntropy, MaskSpec, RegexReward, ReplayBackend, RetryEnvironment, Table
from sdkit.runs.history import by_text
from sdkit.train.loss_masks import build_loss_masks
from sdkit.train.run import open_run
from sdkit.train.step import _collate

RETRY = RetryEnvironment(
    max_turns=3, max_observation_tokens=24, says="No: {feedback}", without_feedback="No. <|im_end|>"
)


def spec_of(folder, **changes):
    """Turns end at the first `e`; only `zz` would be right."""
    parts = {
        "rollout": rollout(stop=("e",), max_new_tokens=24),
        "rewards": Table({"right": RegexReward(pattern="zz")}),
        "environment": RETRY,
    }
    return make_spec(folder, **(parts | changes))


@pytest.fixture
def trainer(tiny_folder, process_group, tmp_path):
    opened = open_run(spec_of(tiny_folder), tmp_path)
    yield opened
    opened.close()


@pytest.fixture
def collected(trainer):
    return collect(trainer)


def test_spans_are_what_the_backend_was_given_and_returned(trainer, collected, monkeypatch):
    asked = []
    backend = trainer.sampler.backends.open(trainer.setup.plan.backend)
    sample = backend.sample

    def listening(requests, sampling):
        answers = sample(requests, sampling)
        asked.extend(zip(requests, answers, strict=True))
        return answers

    monkeypatch.setattr(backend, "sample", listening)
    batch = collect(trainer).batch
    assert [r.completion_ids for r in batch] == [r.completion_ids for r in collected.batch]
    answers = {request.prompt_ids: answer for request, answer in asked}
    assert len(answers) > len(batch)
    for each in batch:
        for span in each.spans:
            if span.sampled:
                answer = answers[*each.prompt_ids, *each.completion_ids[: span.start]]
                assert each.completion_ids[span.start : span.end] == answer.ids
                assert each.sampler_logprobs[span.start : span.end] == answer.logprobs


def test_observations_are_rendered_as_text_that_forges_no_role(trainer, collected):
    decode = trainer.setup.data.tokenizer.decode
    observations = [(r, s) for r in collected.batch for s in r.spans if not s.sampled]
    assert observations
    for each, span in observations:
        text = decode(each.completion_ids[: span.end])
        assert text.endswith("<|im_end|>\n<|im_start|>user\nNo. <|im_end|><|im_end|>\n<|im_start|>assistant\n")
        body = each.completion_ids[slice(*span.body)]
        assert decode(body) == "No. <|im_end|>"
        assert not set(body) & set(trainer.models.special_ids)


def test_endings_and_turn_rewards(collected):
    assert {r.ending for r in collected.batch} <= {"max_turns", "length"}
    for each in collected.batch:
        turns = sum(span.sampled for span in each.spans)
        assert each.turn_rewards == (0.0,) * turns
        assert each.finished == (each.ending == "max_turns")
        assert (each.ending == "max_turns") == (turns == 3 and each.finished)


def test_turn_is_as_long_as_its_trajectory_allows(trainer, collected, tiny_folder, tmp_path, open_tiny, monkeypatch):
    limit = max(r.spans[0].end for r in collected.batch) + 40
    spec = spec_of(tiny_folder, environment=evolve(RETRY, max_trajectory_tokens=limit))
    short = open_tiny(spec)
    asked = []
    backend = short.sampler.backends.open(short.setup.plan.backend)
    sample = backend.sample
    monkeypatch.setattr(
        backend, "sample", lambda requests, sampling: asked.extend(requests) or sample(requests, sampling)
    )
    batch = collect(short).batch
    assert "max_tokens" in {r.ending for r in batch}
    for request in asked:
        used = len(request.prompt_ids) - next(
            len(r.prompt_ids) for r in batch if request.prompt_ids[: len(r.prompt_ids)] == r.prompt_ids
        )
        left = limit - used
        assert request.max_new_tokens == (left if left < 24 else None)
    for ours, longer in zip(batch, collected.batch, strict=True):
        assert len(ours.completion_ids) <= limit
        assert longer.completion_ids[: len(ours.completion_ids)] == ours.completion_ids
        assert (ours.ending == "max_tokens") == (ours.completion_ids != longer.completion_ids)


def test_only_sampled_tokens_are_trained(trainer, collected):
    prepared = prepare_rollouts(trainer, collected.batch)
    sampled = sum(len(r.sampled) for r in prepared)
    assert sampled < sum(len(r.completion_ids) for r in prepared)
    for part in _collate(trainer.learner, prepared, trainer.specs.losses).micro_batches:
        sampled -= len(part.tokens)
    assert sampled == 0
    for each in prepared:
        assert set(each.loss_masks["distil"].positions) == set(each.sampled)


def test_a_term_may_count_the_text_of_observations(trainer, collected):
    world = Table({"world": CrossEntropy(mask=MaskSpec(roles=("user", "tool")))})
    decode = trainer.setup.data.tokenizer.decode
    counted = 0
    for each in build_loss_masks(collected.batch, world, all_gather=collectives.all_gather):
        bodies = [each.completion_ids[slice(*span.body)] for span in each.spans if not span.sampled]
        positions = each.loss_masks["world"].positions
        assert decode([each.completion_ids[p] for p in positions]) == "".join(map(decode, bodies))
        assert not set(positions) & set(each.sampled)
        counted += len(positions)
    assert counted


def test_trajectory_of_one_turn_is_a_completion_without_environment(tiny_folder, process_group, tmp_path):
    at_once = evolve(RETRY, threshold=0.0)
    spec = spec_of(tiny_folder, environment=at_once)
    alone = train(evolve(spec, environment=None), tmp_path / "alone")
    played = train(spec, tmp_path / "played")
    own = [{name: value for name, value in line.items() if "trajectory/" not in name} for line in metrics(played)]
    assert metrics(alone) == own
    for key, value in weights_of(alone).items():
        assert torch.equal(value, weights_of(played)[key])


def test_recorded_trajectories_are_replayed_without_the_environment(tiny_folder, process_group, tmp_path, monkeypatch):
    from sdkit.environments import retry

    spec = spec_of(tiny_folder)
    run = train(spec, tmp_path / "run")
    monkeypatch.setattr(retry.Retry, "reply", None)
    again = train(evolve(spec, rollout=evolve(spec.rollout, backend=ReplayBackend(run=str(run)))), tmp_path / "again")
    assert metrics(again) == metrics(run)
    for key, value in weights_of(run).items():
        assert torch.equal(value, weights_of(again)[key])


def test_evaluation_plays_trajectories_and_counts_success_by_turn(tiny_folder, process_group, tmp_path):
    spec = with_evaluation(spec_of(tiny_folder, training=training(steps=1)), teacher_lift=0)
    environment = evolve(RETRY, reward="number", without_feedback="No.")
    printed = Console(file=StringIO(), width=200)
    run = train(evolve(spec, reward="right", environment=environment), tmp_path / "run", printed)
    records = lines(run / "evaluations" / "step_000000.jsonl")
    assert any(len(record["turn_rewards"]) > 1 for record in records)
    for record in records:
        assert record["completion"].startswith("[assistant] ")
        assert record["completion"].count("[user] No.") == len(record["turn_rewards"]) - 1
        found = [0.0, *record["turn_rewards"]].index(1.0) if 1.0 in record["turn_rewards"] else 99
        assert [record["scores"][f"within_{k}"] for k in (1, 2, 3)] == [float(found <= k) for k in (1, 2, 3)]
    start = metrics(run)[0]
    drawn = [r["scores"] for r in records if (r["suite"], r["decoding"]) == ("sums", "drawn")]
    first, second = (sum(scores[f"within_{k}"] for scores in drawn) for k in (1, 2))
    assert start["eval/sums/drawn/within_2"] == pytest.approx(second / len(drawn))
    assert start["eval/sums/drawn/given_failure_2"] == pytest.approx((second - first) / (len(drawn) - first))
    turns = [4 - sum(scores[f"within_{k}"] for k in (1, 2, 3)) for scores in drawn if scores["within_3"]]
    assert start["eval/sums/drawn/turns_to_success"] == pytest.approx(sum(turns) / len(turns))
    assert "success by turn, before → after training" in printed.file.getvalue()


def test_games_with_the_same_prompt_are_compared_one_by_one():
    by_row = {(3, "guess"): 0.0, (5, "guess"): 1.0}
    assert by_text(by_row) == {"guess (row 3)": 0.0, "guess (row 5)": 1.0}
    assert by_text({(3, "one"): 0.0, (5, "two"): 1.0}) == {"one": 0.0, "two": 1.0}
