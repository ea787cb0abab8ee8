"""A served teacher: it matches the same model in process, and unsuitable servers are refused before training."""

import json

import pytest
import torch
from attrs import evolve
from test_external import copy_with_swapped_tokens
from test_routed import routed_data, routed_teacher
from tinyruns import (
    MINUS_GRADIENT,
    advance,
    distil,
    evaluate_objective,
    lines,
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

from sdkit.language.errors import BadData, BadEnvironment, ProcessDied
from sdkit.language.specs import (
    CrossEntropy,
    ExternalWeights,
    ForwardKl,
    FrozenWeights,
    LogRatio,
    OptimizerSpec,
    PerplexityWeight,
    PolicyGradient,
    ReverseKl,
    SampledTokenSupport,
    ServedWeights,
    Table,
    TopKSupport,
)
from sdkit.serving import client
from sdkit.serving.tiny_server import TinyServer
from sdkit.train.run import open_run
from sdkit.train.smoke import smoke

K = 7
TOP = distil(support=TopKSupport(k=K, chosen_by="teacher", remainder="tail_bucket"))
ENTROPY = {"distil/teacher_entropy"}


@pytest.fixture(scope="module")
def server(other_folder):
    tiny_server = TinyServer(other_folder, "big", max_logprobs=K)
    yield tiny_server
    tiny_server.close()


@pytest.fixture
def served(server, monkeypatch):
    monkeypatch.setattr(client, "FIRST_RETRY_DELAY", 0.01)

    def build(**changes):
        return ServedWeights(**({"url": server.url, "model": "big"} | changes))

    return build


def external(folder):
    return ExternalWeights(path=str(folder), dtype="float32")


def gradient(trainer, batch):

    before = masters(trainer)
    result = train_step(trainer, batch)
    assert result.applied
    return result.metrics, {n: before[n] - value for n, value in masters(trainer).items()}


def served_and_local(open_tiny, folder, served, other_folder, **changes):
    """Metrics and gradients of the same batch with the served model and with the same model in process."""
    results = []
    for weights in (served(), external(other_folder)):
        spec = make_spec(folder, teacher=teacher(weights), optimizer=MINUS_GRADIENT, **({"losses": TOP} | changes))
        trainer = open_tiny(spec)
        results.append(gradient(trainer, rollouts_of(trainer)))
    return results


@pytest.mark.parametrize("remainder", ["tail_bucket", "renormalize", "renormalize_teacher", "drop"])
def test_step_matches_the_same_model_in_process(open_tiny, tiny_folder, served, other_folder, remainder):
    support = TopKSupport(k=K, chosen_by="teacher", remainder=remainder)
    losses = distil(support=support, divergence=ForwardKl())
    actual, expected = served_and_local(open_tiny, tiny_folder, served, other_folder, losses=losses)
    assert expected[0].keys() - actual[0].keys() == ENTROPY
    for name in actual[0]:
        assert actual[0][name] == pytest.approx(expected[0][name], abs=1e-4), name
    for name, value in actual[1].items():
        torch.testing.assert_close(value, expected[1][name], atol=2e-5, rtol=1e-3)


def test_renormalized_scores_are_tempered(open_tiny, tiny_folder, served, other_folder):
    support = TopKSupport(k=K, chosen_by="teacher", remainder="renormalize")
    actual, expected = served_and_local(
        open_tiny, tiny_folder, served, other_folder, losses=distil(support=support), rollout=rollout(temperature=0.7)
    )
    assert actual[0]["loss"] == pytest.approx(expected[0]["loss"], abs=1e-5)


def test_sampled_token_log_ratio_and_weight_match(open_tiny, tiny_folder, served, other_folder):
    losses = Table(
        {
            **distil(divergence=ReverseKl(), support=SampledTokenSupport()),
            "pull": PolicyGradient(advantage=LogRatio(center="sequence")),
            "imitate": CrossEntropy(weight=PerplexityWeight(of="teacher", power=0.5)),
        }
    )
    actual, expected = served_and_local(
        open_tiny, tiny_folder, served, other_folder, losses=losses, rollout=rollout(completions_per_prompt=2)
    )
    for name in actual[0]:
        assert actual[0][name] == pytest.approx(expected[0][name], abs=1e-4), name
    for name, value in actual[1].items():
        torch.testing.assert_close(value, expected[1][name], atol=2e-5, rtol=1e-3)


def test_split_into_micro_batches_changes_nothing(open_tiny, tiny_folder, served):
    losses = []
    for budget in (10**6, 90):
        spec = make_spec(
            tiny_folder,
            teacher=teacher(served()),
            losses=TOP,
            rollout=rollout(completions_per_prompt=3),
            training=training(micro_batch_tokens=budget),
        )
        trainer = open_tiny(spec)
        losses.append(evaluate_objective(trainer, rollouts_of(trainer))["loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_training_on_a_served_teacher_lowers_the_loss(open_tiny, tiny_folder, served):
    spec = make_spec(tiny_folder, teacher=teacher(served()), losses=TOP, optimizer=OptimizerSpec(lr=1e-2))
    trainer = open_tiny(spec)
    before = evaluate_objective(trainer, rollouts_of(trainer))["loss"]
    advance(trainer, 8)
    assert evaluate_objective(trainer, rollouts_of(trainer))["loss"] < 0.7 * before
    assert trainer.models.teacher.state() == {}


@pytest.mark.parametrize("cut", [10**6, 90])
def test_served_teacher_can_be_one_of_several_routes(open_tiny, tiny_folder, served, other_folder, cut):
    """Every route then returns its top k tokens, in any micro-batch."""
    losses = []
    for weights in (served(), external(other_folder)):
        routes = routed_teacher(math=weights, code=FrozenWeights(), chat=external(tiny_folder))
        spec = make_spec(
            tiny_folder,
            teacher=routes,
            data=routed_data(),
            losses=TOP,
            training=training(prompts_per_step=6, micro_batch_tokens=cut),
        )
        trainer = open_tiny(spec)
        losses.append(evaluate_objective(trainer, rollouts_of(trainer)))
    assert losses[0]["loss"] == pytest.approx(losses[1]["loss"], abs=1e-5)
    assert losses[1].keys() - losses[0].keys() == ENTROPY


def test_ids_that_the_student_lacks_are_left_out(open_tiny, tiny_folder, served, server):
    trainer = open_tiny(make_spec(tiny_folder, teacher=teacher(served()), losses=TOP))
    batch = next(iter(_micro_batches(trainer)))
    limited = evolve(trainer.learner.scorer, models=evolve(trainer.models, compared_ids=300))
    scores = limited.score_teacher(batch, None)
    assert (scores.ids < 300).all()
    gaps = scores.logprobs == -torch.inf
    assert 0 < gaps.sum() < gaps.numel()
    assert (gaps[:, 1:] >= gaps[:, :-1]).all()  # the gaps are at the end
    assert torch.isfinite(scores.sampled).all()


def _micro_batches(trainer):
    from sdkit.train.step import _collate

    return _collate(trainer.learner, rollouts_of(trainer), trainer.specs.losses).micro_batches


def test_complete_run_with_evaluation(tiny_folder, served, tmp_path, process_group, server):
    spec = with_evaluation(make_spec(tiny_folder, teacher=teacher(served()), losses=TOP))
    folder = train(spec, tmp_path / "run")
    steps = [line for line in lines(folder / "metrics.jsonl") if "grad_norm" in line]
    assert len(steps) == 3
    assert all("distil/teacher_mass" in line for line in steps)
    recorded = json.loads((folder / "provenance.json").read_text())["served_teachers"]
    assert recorded == [{"url": server.url, "model": "big", "root": "big"}]


@pytest.mark.parametrize("support", ["top_k", "sampled_token"])
def test_smoke_replaces_a_served_teacher(tmp_path, process_group, support):
    weights = ServedWeights(url="https://never.example", model="there", allow_remote=True, key_from="NO_SUCH_KEY")
    sampled = distil(divergence=ReverseKl(), support=SampledTokenSupport())
    losses = {"top_k": TOP, "sampled_token": sampled}[support]
    spec = make_spec("org/never-there", teacher=teacher(weights, sees=None), losses=losses)
    assert len(smoke(spec, silent_console())) == 2


@pytest.fixture
def assert_refused(tiny_folder, tmp_path, monkeypatch, process_group):
    monkeypatch.setattr("sdkit.train.models.load_model", lambda *_: pytest.fail("weights loaded"))

    def refuse_run(weights, error, message, **changes):
        spec = make_spec(tiny_folder, **({"teacher": teacher(weights), "losses": TOP} | changes))
        with pytest.raises(error, match=message) as caught:
            open_run(spec, tmp_path)
        return caught.value

    return refuse_run


def test_unreachable_server_is_refused(assert_refused, served):
    url = "http://127.0.0.1:1"
    error = assert_refused(served(url=url), BadEnvironment, f"{url}/v1/models cannot be reached")
    assert error.exit_code == 4
    assert "attempts in" not in error.message  # no retries at the start


def test_server_of_another_model_is_refused(assert_refused, served):
    assert_refused(served(model="small"), BadEnvironment, "serves 'big', not 'small'")


def test_missing_key_is_refused(assert_refused, served, monkeypatch):
    monkeypatch.delenv("TEACHER_KEY", raising=False)
    assert_refused(served(key_from="TEACHER_KEY"), BadEnvironment, "the environment has no TEACHER_KEY")


def test_too_few_logprobs_are_refused(assert_refused, served):
    losses = distil(support=TopKSupport(k=K + 1, chosen_by="teacher", remainder="drop"))
    error = assert_refused(served(), BadEnvironment, "greater than max allowed: 7", losses=losses)
    assert error.hint == "start it with --max-logprobs 8"


def test_too_long_sequences_are_refused(assert_refused, served, monkeypatch):
    monkeypatch.setattr("sdkit.serving.tiny_server.CONTEXT", 40)
    error = assert_refused(served(), BadData, "the served teacher big accepts 39")
    assert "--max-model-len" in error.hint


def test_other_vocabulary_is_refused(assert_refused, served, other_folder, tmp_path):
    other = TinyServer(copy_with_swapped_tokens(other_folder, tmp_path / "swapped"), "big")
    try:
        message = r"at http\S+ has another vocabulary .* the id \d+ is 'a' for the student, 'b' for"
        assert_refused(served(url=other.url), BadData, message)
    finally:
        other.close()


def test_tokenizer_with_another_vocabulary_is_refused(assert_refused, served, other_folder, tmp_path):
    folder = copy_with_swapped_tokens(other_folder, tmp_path / "swapped")
    assert_refused(served(tokenizer=str(folder)), BadData, "another vocabulary than the student: 'a' has")


def test_values_that_are_no_log_probabilities_are_refused(assert_refused, served, server, monkeypatch):
    original_answer = server.answer

    def shifted_answer(path, body):
        status, answer = original_answer(path, body)
        for entries in (answer["choices"][0]["prompt_logprobs"] if "choices" in answer else ())[1:]:
            for entry in entries.values():
                entry["logprob"] += 5
        return status, answer

    monkeypatch.setattr(server, "reply", shifted_answer)
    assert_refused(served(), BadEnvironment, "without the log-probabilities of the prompt")


def test_server_that_dies_ends_the_run_with_one_line(open_tiny, tiny_folder, served, other_folder):
    tiny_server = TinyServer(other_folder, "big")
    weights = served(url=tiny_server.url, retries=2)
    trainer = open_tiny(make_spec(tiny_folder, teacher=teacher(weights), losses=TOP))
    advance(trainer, 1)
    tiny_server.close()
    with pytest.raises(ProcessDied, match=r"cannot be reached: .* \(3 attempts") as caught:
        advance(trainer, 1)
    assert caught.value.exit_code == 6
    assert "\n" not in caught.value.message


def test_invalid_answer_ends_the_run(open_tiny, tiny_folder, served, server, monkeypatch):
    trainer = open_tiny(make_spec(tiny_folder, teacher=teacher(served()), losses=TOP))
    for answer, message in (
        ({"choices": [{"prompt_logprobs": None}]}, "without the log-probabilities of the prompt"),
        ({"choices": [{"prompt_logprobs": [None]}]}, "returned 1 tokens for"),
        ({"choices": []}, "without the log-probabilities of the prompt"),
    ):
        monkeypatch.setattr(server, "reply", lambda path, body, answer=answer: (200, answer))
        with pytest.raises(ProcessDied, match=message):
            advance(trainer, 1)


def test_busy_server_is_waited_for(open_tiny, tiny_folder, served, server, monkeypatch):
    trainer = open_tiny(make_spec(tiny_folder, teacher=teacher(served()), losses=TOP))
    errors, answer = [503, 429, 500], server.answer
    monkeypatch.setattr(server, "reply", lambda path, body: (errors.pop(), {}) if errors else answer(path, body))
    assert advance(trainer, 1)[0].applied
    assert not errors
