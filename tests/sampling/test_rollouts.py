"""Sampling on the training weights, and replay: tokens depend on the seed alone, log-probabilities are the trainer's."""

import pytest
import torch
from tinyruns import make_spec, metrics, rollout, train, training, weights_of

from sdkit.batches import SamplingParams, SamplingRequest
from sdkit.language.errors import BadData, UnreadableInput
from sdkit.language.specs import ReplayBackend
from sdkit.models.weights import Weights
from sdkit.sampling.replay import ReplayRollouts
from sdkit.sampling.transformers import TransformersRollouts
from sdkit.seeds import derive


@pytest.fixture(scope="module")
def weights(tiny_folder):
    from transformers import AutoModelForCausalLM

    return Weights(AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32))


@pytest.fixture(scope="module")
def end(tiny_tokenizer):
    return tiny_tokenizer.eos_token_id


@pytest.fixture(scope="module")
def sampled(weights, tiny_tokenizer, end):
    """Sample on the tiny model: (requests, batch_size, settings) → completions."""

    def run(requests, batch_size=64, end_ids=(end,), **settings):
        parts = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 12}
        backend = TransformersRollouts(tiny_tokenizer, batch_size, end_ids)
        backend.load(weights, 0)
        return backend.sample(requests, SamplingParams(**(parts | settings)))

    return run


def prompts(tokenizer, count=12):
    """Prompts of different lengths."""
    texts = [f"What is {i} + {3 * i}?" + " How many letters?" * (i % 4) for i in range(count)]
    return [tuple(tokenizer(text)["input_ids"]) for text in texts]


@pytest.fixture(scope="module")
def requests(tiny_tokenizer):
    return [SamplingRequest(prompt_ids=ids, seed=derive(7, i)) for i, ids in enumerate(prompts(tiny_tokenizer))]


def logits_of(weights, request, completion):
    """Logits of a plain forward pass that predict the completion's tokens, [T, V]."""
    ids = torch.tensor([[*request.prompt_ids, *completion.ids]])
    with torch.no_grad():
        logits = weights.model(input_ids=ids).logits[0]
    return logits[len(request.prompt_ids) - 1 : -1]


def chosen(logprobs, ids):
    return logprobs.gather(-1, torch.tensor(ids)[:, None])[:, 0]


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_tokens_depend_on_prompt_and_seed_alone(sampled, requests, batch_size):
    # Padding and neighbours move float32 logits by 1e-6, so a draw would have to fall that close to an edge.
    alone = sampled(requests)
    again = sampled(requests[::-1], batch_size)[::-1]
    assert [c.ids for c in again] == [c.ids for c in alone]
    for a, b in zip(alone, again, strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
    assert sampled(requests[3:5])[1].ids == alone[4].ids


def test_the_same_call_gives_the_same_bits(sampled, requests):
    first, second = sampled(requests), sampled(requests)
    assert [(c.ids, c.logprobs) for c in first] == [(c.ids, c.logprobs) for c in second]


def test_another_seed_gives_other_tokens(sampled, requests):
    others = [SamplingRequest(prompt_ids=r.prompt_ids, seed=r.seed + 1) for r in requests]
    pairs = zip(sampled(requests), sampled(others), strict=True)
    assert all(a.ids != b.ids for a, b in pairs)


def test_the_global_generator_is_left_alone(sampled, requests):
    before = torch.get_rng_state()
    sampled(requests)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_logprobs_are_the_trainers_under_the_temperature(sampled, weights, requests, temperature):
    for request, completion in zip(requests, sampled(requests, temperature=temperature), strict=True):
        expected = (logits_of(weights, request, completion) / temperature).log_softmax(-1)
        found = torch.tensor(completion.logprobs)
        torch.testing.assert_close(found, chosen(expected, completion.ids), atol=1e-4, rtol=0)


def test_temperature_0_takes_the_likeliest_token(sampled, weights, requests):
    for request, completion in zip(requests, sampled(requests, temperature=0.0), strict=True):
        logprobs = logits_of(weights, request, completion).log_softmax(-1)
        assert list(completion.ids) == logprobs.argmax(-1).tolist()
        found = torch.tensor(completion.logprobs)
        torch.testing.assert_close(found, chosen(logprobs, completion.ids), atol=1e-4, rtol=0)


@pytest.mark.parametrize("settings", [{"top_k": 3}, {"top_p": 0.6}, {"top_k": 5, "top_p": 0.5}])
def test_truncation_keeps_to_its_set_and_renormalises(sampled, weights, requests, settings):
    for request, completion in zip(requests, sampled(requests, temperature=1.2, **settings), strict=True):
        for logits, token, logprob in zip(
            logits_of(weights, request, completion) / 1.2, completion.ids, completion.logprobs, strict=True
        ):
            kept = kept_tokens(logits, **settings)
            assert token in kept
            expected = logits[kept].log_softmax(-1)[kept.index(token)]
            assert logprob == pytest.approx(expected.item(), abs=1e-4)


def kept_tokens(logits, top_k=0, top_p=1.0):
    """The likeliest k; of these, the fewest that hold top_p of their probability."""
    order = logits.argsort(descending=True).tolist()
    order = order[:top_k] if top_k else order
    held, kept = 0.0, []
    for token, share in zip(order, logits[order].softmax(-1).tolist(), strict=True):
        if held >= top_p:
            break
        kept.append(token)
        held += share
    return kept


def test_draws_follow_the_probabilities(sampled, weights, requests):
    draws = 10_000
    many = [SamplingRequest(prompt_ids=requests[0].prompt_ids, seed=derive(1, i)) for i in range(draws)]
    first = [c.ids[0] for c in sampled(many, batch_size=1000, max_new_tokens=1)]
    ids = torch.tensor([requests[0].prompt_ids])
    with torch.no_grad():
        shares = weights.model(input_ids=ids).logits[0, -1].double().softmax(-1)
    expected, seen = shares * draws, torch.bincount(torch.tensor(first), minlength=len(shares))
    kolmogorov_smirnov = (seen.cumsum(0) - expected.cumsum(0)).abs().max() / draws
    assert kolmogorov_smirnov < 1.63 / draws**0.5
    rare = expected < 5
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    seen = torch.cat([seen[~rare], seen[rare].sum()[None]])
    freedom = len(expected) - 1
    assert freedom > 20
    chi_square = ((seen - expected).square() / expected).sum()
    assert chi_square < freedom + 3 * (2 * freedom) ** 0.5


def test_the_end_token_is_kept_and_nothing_follows(sampled, requests, end):
    plain = sampled(requests, max_new_tokens=16)
    ends = {end, *(c.ids[5] for c in plain[:3])}  # tokens that do come
    cut = sampled(requests, end_ids=tuple(ends), max_new_tokens=16)
    assert {c.finished for c in cut} == {True, False}
    for whole, completion in zip(plain, cut, strict=True):
        stops = [i + 1 for i, token in enumerate(whole.ids) if token in ends]
        assert completion.ids == whole.ids[: stops[0] if stops else None]
        assert completion.finished == bool(stops)
        assert len(completion.logprobs) == len(completion.ids)


def test_a_completion_that_ends_at_the_limit_is_finished(sampled, requests):
    one = requests[:1]
    ids = sampled(one, max_new_tokens=4)[0].ids
    assert sampled(one, end_ids=(ids[-1],), max_new_tokens=4)[0].finished


def test_stop_texts_end_a_completion_in_a_batch_of_others(sampled, tiny_tokenizer, requests):
    plain = sampled(requests, max_new_tokens=16)
    said = [[tiny_tokenizer.decode(c.ids[:n]) for n in range(1, 17)] for c in plain]
    words = {tiny_tokenizer.decode(c.ids[n]) for c in plain[:3] for n in (5, 6, 7, 8)}
    stop = tuple(word for word in words if word.isascii() and word.isprintable())
    cut = sampled(requests, max_new_tokens=16, stop=stop)
    assert {c.finished for c in cut} == {True, False}
    for whole, so_far, completion in zip(plain, said, cut, strict=True):
        stops = [n for n, text in enumerate(so_far, 1) if any(word in text for word in stop)]
        assert completion.ids == whole.ids[: stops[0] if stops else None]
        assert completion.finished == (bool(stops) or whole.finished)
        assert len(completion.logprobs) == len(completion.ids)


@pytest.fixture(scope="module")
def recorded(tiny_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("recorded") / "run"
    return train(make_spec(tiny_folder, rollout=rollout(completions_per_prompt=2)), folder)


def replayed(tiny_folder, recorded, **changes):
    backend = ReplayBackend(run=str(recorded))
    return make_spec(tiny_folder, rollout=rollout(completions_per_prompt=2, backend=backend), **changes)


def test_a_replayed_run_is_the_run(tiny_folder, recorded, tmp_path):
    again = train(replayed(tiny_folder, recorded), tmp_path / "again")
    assert metrics(again) == metrics(recorded)
    before, after = weights_of(recorded), weights_of(again)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_prompt_that_was_not_recorded_is_an_error(tiny_folder, recorded, tmp_path):
    other = replayed(tiny_folder, recorded, training=training(seed=1))
    with pytest.raises(BadData, match="did not record a completion"):
        train(other, tmp_path / "other")


def test_a_folder_without_rollouts_is_an_error(tmp_path):
    with pytest.raises(BadData, match="holds no recorded rollouts"):
        ReplayRollouts(tmp_path)


def test_a_damaged_record_is_an_error_with_its_line(tmp_path):
    (tmp_path / "rollouts").mkdir()
    (tmp_path / "rollouts" / "step_000000.jsonl").write_text('{"seed": 1, "sampl\n')
    with pytest.raises(UnreadableInput, match=r"step_000000.jsonl:1: not a JSON object"):
        ReplayRollouts(tmp_path)
