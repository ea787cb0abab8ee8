"""A teacher behind a server: what it tells is what the same model says here, and what is refused before training."""

import json

import pytest
import torch
from attrs import evolve
from test_external import swapped
from test_routed import data, routed
from tinyruns import (
    advance,
    distil,
    evaluate_objective,
    evaluated,
    lines,
    make_spec,
    masters,
    rollout,
    rollouts_of,
    silent,
    teacher,
    train,
    train_step,
    training,
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
from sdkit.models import tiny
from sdkit.serving import client
from sdkit.serving.tiny_server import TinyServer
from sdkit.train.run import open_run
from sdkit.train.smoke import smoke

K = 7
TOP = distil(support=TopKSupport(k=K, chosen_by="teacher", remainder="tail_bucket"))
# The first step of Adam is −lr · g / (|g| + eps): with eps far above |g| and lr = eps it is −g.
MINUS_GRADIENT = OptimizerSpec(lr=1e4, eps=1e4, max_grad_norm=1e9)
ENTROPY = {"distil/teacher_entropy"}


@pytest.fixture(scope="module")
def other_folder(tmp_path_factory):
    return tiny.build(tmp_path_factory.mktemp("other") / "model", seed=1)


@pytest.fixture(scope="module")
def server(other_folder):
    opened = TinyServer(other_folder, "big", max_logprobs=K)
    yield opened
    opened.close()


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
    measured = train_step(trainer, batch)
    assert measured.applied
    return measured.metrics, {n: before[n] - value for n, value in masters(trainer).items()}


def both(open_tiny, folder, served, other_folder, **changes):
    """The same batch under the served model and under the same model held here: metrics and gradients."""
    found = []
    for weights in (served(), external(other_folder)):
        spec = make_spec(folder, teacher=teacher(weights), optimizer=MINUS_GRADIENT, **({"losses": TOP} | changes))
        trainer = open_tiny(spec)
        found.append(gradient(trainer, rollouts_of(trainer)))
    return found


@pytest.mark.parametrize("remainder", ["tail_bucket", "renormalize", "renormalize_teacher", "drop"])
def test_a_step_is_that_of_the_same_model_held_here(open_tiny, tiny_folder, served, other_folder, remainder):
    support = TopKSupport(k=K, chosen_by="teacher", remainder=remainder)
    losses = distil(support=support, divergence=ForwardKl())
    told, whole = both(open_tiny, tiny_folder, served, other_folder, losses=losses)
    assert whole[0].keys() - told[0].keys() == ENTROPY
    for name in told[0]:
        assert told[0][name] == pytest.approx(whole[0][name], abs=1e-4), name
    for name, value in told[1].items():
        torch.testing.assert_close(value, whole[1][name], atol=2e-5, rtol=1e-3)


def test_tempered_after_rescaling(open_tiny, tiny_folder, served, other_folder):
    support = TopKSupport(k=K, chosen_by="teacher", remainder="renormalize")
    told, whole = both(
        open_tiny, tiny_folder, served, other_folder, losses=distil(support=support), rollout=rollout(temperature=0.7)
    )
    assert told[0]["loss"] == pytest.approx(whole[0]["loss"], abs=1e-5)


def test_the_sampled_token_the_log_ratio_and_a_measured_weight(open_tiny, tiny_folder, served, other_folder):
    losses = Table(
        {
            **distil(divergence=ReverseKl(), support=SampledTokenSupport()),
            "pull": PolicyGradient(advantage=LogRatio(center="sequence")),
            "imitate": CrossEntropy(weight=PerplexityWeight(of="teacher", power=0.5)),
        }
    )
    told, whole = both(
        open_tiny, tiny_folder, served, other_folder, losses=losses, rollout=rollout(completions_per_prompt=2)
    )
    for name in told[0]:
        assert told[0][name] == pytest.approx(whole[0][name], abs=1e-4), name
    for name, value in told[1].items():
        torch.testing.assert_close(value, whole[1][name], atol=2e-5, rtol=1e-3)


def test_how_a_step_is_cut_changes_nothing(open_tiny, tiny_folder, served):
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


def test_it_teaches(open_tiny, tiny_folder, served):
    spec = make_spec(tiny_folder, teacher=teacher(served()), losses=TOP, optimizer=OptimizerSpec(lr=1e-2))
    trainer = open_tiny(spec)
    before = evaluate_objective(trainer, rollouts_of(trainer))["loss"]
    advance(trainer, 8)
    assert evaluate_objective(trainer, rollouts_of(trainer))["loss"] < 0.7 * before
    assert trainer.models.teacher.state() == {}


@pytest.mark.parametrize("cut", [10**6, 90])
def test_on_one_of_several_routes(open_tiny, tiny_folder, served, other_folder, cut):
    """Every route then tells of its k likeliest tokens, whichever stand in a micro-batch."""
    losses = []
    for weights in (served(), external(other_folder)):
        routes = routed(math=weights, code=FrozenWeights(), chat=external(tiny_folder))
        spec = make_spec(
            tiny_folder,
            teacher=routes,
            data=data(),
            losses=TOP,
            training=training(prompts_per_step=6, micro_batch_tokens=cut),
        )
        trainer = open_tiny(spec)
        losses.append(evaluate_objective(trainer, rollouts_of(trainer)))
    assert losses[0]["loss"] == pytest.approx(losses[1]["loss"], abs=1e-5)
    assert losses[1].keys() - losses[0].keys() == ENTROPY


def test_ids_that_the_student_has_not_are_left_out(open_tiny, tiny_folder, served, server):
    trainer = open_tiny(make_spec(tiny_folder, teacher=teacher(served()), losses=TOP))
    batch = next(iter(_micro_batches(trainer)))
    fewer = evolve(trainer.learner.scorer, models=evolve(trainer.models, compared_ids=300))
    told = fewer.score_teacher(batch, None)
    assert (told.ids < 300).all()
    gaps = told.logprobs == -torch.inf
    assert 0 < gaps.sum() < gaps.numel()
    assert (gaps[:, 1:] >= gaps[:, :-1]).all()  # they stand at the end
    assert torch.isfinite(told.sampled).all()


def _micro_batches(trainer):
    from sdkit.train.step import _collate

    return _collate(trainer.learner, rollouts_of(trainer), trainer.specs.losses).micro_batches


def test_a_whole_run_with_evaluation(tiny_folder, served, tmp_path, process_group, server):
    spec = evaluated(make_spec(tiny_folder, teacher=teacher(served()), losses=TOP))
    folder = train(spec, tmp_path / "run")
    steps = [line for line in lines(folder / "metrics.jsonl") if "grad_norm" in line]
    assert len(steps) == 3
    assert all("distil/teacher_mass" in line for line in steps)
    told = json.loads((folder / "provenance.json").read_text())["served_teachers"]
    assert told == [{"url": server.url, "model": "big", "root": "big"}]


@pytest.mark.parametrize("support", ["top_k", "sampled_token"])
def test_smoke_asks_a_server_in_miniature(tmp_path, process_group, support):
    weights = ServedWeights(url="https://never.example", model="there", allow_remote=True, key_from="NO_SUCH_KEY")
    sampled = distil(divergence=ReverseKl(), support=SampledTokenSupport())
    losses = {"top_k": TOP, "sampled_token": sampled}[support]
    spec = make_spec("org/never-there", teacher=teacher(weights, sees=None), losses=losses)
    assert len(smoke(spec, silent())) == 2


@pytest.fixture
def refused(tiny_folder, tmp_path, monkeypatch, process_group):
    monkeypatch.setattr("sdkit.train.models.load_model", lambda *_: pytest.fail("weights loaded"))

    def opening(weights, error, message, **changes):
        spec = make_spec(tiny_folder, **({"teacher": teacher(weights), "losses": TOP} | changes))
        with pytest.raises(error, match=message) as caught:
            open_run(spec, tmp_path)
        return caught.value

    return opening


def test_a_server_that_is_not_there(refused, served):
    url = "http://127.0.0.1:1"
    error = refused(served(url=url), BadEnvironment, f"{url}/v1/models cannot be reached")
    assert error.exit_code == 4
    assert "attempts in" not in error.message  # nothing is tried twice at the start


def test_another_model(refused, served):
    refused(served(model="small"), BadEnvironment, "serves 'big', not 'small'")


def test_a_key_that_is_not_exported(refused, served, monkeypatch):
    monkeypatch.delenv("TEACHER_KEY", raising=False)
    refused(served(key_from="TEACHER_KEY"), BadEnvironment, "the environment has no TEACHER_KEY")


def test_too_few_logprobs(refused, served):
    losses = distil(support=TopKSupport(k=K + 1, chosen_by="teacher", remainder="drop"))
    error = refused(served(), BadEnvironment, "greater than max allowed: 7", losses=losses)
    assert error.hint == "start it with --max-logprobs 8"


def test_sequences_that_are_too_long(refused, served, monkeypatch):
    monkeypatch.setattr("sdkit.serving.tiny_server.CONTEXT", 40)
    error = refused(served(), BadData, "the served teacher big accepts 39")
    assert "--max-model-len" in error.hint


def test_another_vocabulary(refused, served, other_folder, tmp_path):
    other = TinyServer(swapped(other_folder, tmp_path / "swapped"), "big")
    try:
        message = r"at http\S+ has another vocabulary .* the id \d+ is 'a' for the student, 'b' for"
        refused(served(url=other.url), BadData, message)
    finally:
        other.close()


def test_another_tokenizer_than_the_one_named(refused, served, other_folder, tmp_path):
    folder = swapped(other_folder, tmp_path / "swapped")
    refused(served(tokenizer=str(folder)), BadData, "another vocabulary than the student: 'a' has")


def test_values_that_are_no_log_probabilities(refused, served, server, monkeypatch):
    plain = server.answer

    def logits(path, body):
        status, said = plain(path, body)
        for place in (said["choices"][0]["prompt_logprobs"] if "choices" in said else ())[1:]:
            for entry in place.values():
                entry["logprob"] += 5
        return status, said

    monkeypatch.setattr(server, "reply", logits)
    refused(served(), BadEnvironment, "without the log-probabilities of the prompt")


def test_a_server_that_dies_ends_the_run_in_one_line(open_tiny, tiny_folder, served, other_folder):
    mortal = TinyServer(other_folder, "big")
    weights = served(url=mortal.url, retries=2)
    trainer = open_tiny(make_spec(tiny_folder, teacher=teacher(weights), losses=TOP))
    advance(trainer, 1)
    mortal.close()
    with pytest.raises(ProcessDied, match=r"cannot be reached: .* \(3 attempts") as caught:
        advance(trainer, 1)
    assert caught.value.exit_code == 6
    assert "\n" not in caught.value.message


def test_a_server_that_answers_nonsense_ends_the_run(open_tiny, tiny_folder, served, server, monkeypatch):
    trainer = open_tiny(make_spec(tiny_folder, teacher=teacher(served()), losses=TOP))
    for said, message in (
        ({"choices": [{"prompt_logprobs": None}]}, "without the log-probabilities of the prompt"),
        ({"choices": [{"prompt_logprobs": [None]}]}, "returned 1 tokens for"),
        ({"choices": []}, "without the log-probabilities of the prompt"),
    ):
        monkeypatch.setattr(server, "reply", lambda path, body, said=said: (200, said))
        with pytest.raises(ProcessDied, match=message):
            advance(trainer, 1)


def test_a_busy_server_is_waited_for(open_tiny, tiny_folder, served, server, monkeypatch):
    trainer = open_tiny(make_spec(tiny_folder, teacher=teacher(served()), losses=TOP))
    busy, plain = [503, 429, 500], server.answer
    monkeypatch.setattr(server, "reply", lambda path, body: (busy.pop(), {}) if busy else plain(path, body))
    assert advance(trainer, 1)[0].applied
    assert not busy
