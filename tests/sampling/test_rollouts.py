"""Sampling on the training weights, and replay: tokens depend only on the seed; log-probabilities are the trainer's."""

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
from sdkit.stdout import no_progress


@pytest.fixture(scope="module")
def weights(tiny_folder):
    from transformers import AutoModelForCausalLM

    return Weights(AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32))


@pytest.fixture(scope="module")
def end(tiny_tokenizer):
    return tiny_tokenizer.eos_token_id


@pytest.fixture(scope="module")
def sample_tiny(weights, tiny_tokenizer, end):
    """Samples on the tiny model: (requests, batch_size, settings) → completions."""

    def run(requests, batch_size=64, end_ids=(end,), advance=no_progress, **settings):
        parts = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 12}
        backend = TransformersRollouts(tiny_tokenizer, batch_size, end_ids)
        backend.load(weights, 0)
        return backend.sample(requests, SamplingParams(**(parts | settings)), advance)

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


def gather_logprobs(logprobs, ids):
    return logprobs.gather(-1, torch.tensor(ids)[:, None])[:, 0]


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_tokens_depend_only_on_prompt_and_seed(sample_tiny, requests, batch_size):
    # Padding and other rows change float32 logits by 1e-6, so a draw changes only if it falls that close to an edge.
    together = sample_tiny(requests)
    in_batches = sample_tiny(requests[::-1], batch_size)[::-1]
    assert [c.ids for c in in_batches] == [c.ids for c in together]
    for a, b in zip(together, in_batches, strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
    assert sample_tiny(requests[3:5])[1].ids == together[4].ids


def test_progress_adds_up_to_the_number_of_requests(sample_tiny, requests):
    done = []
    sample_tiny(requests[:6], 4, advance=done.append, max_new_tokens=5)
    assert sum(done) == pytest.approx(6)
    assert len(done) > 4


def test_same_call_is_bitwise_reproducible(sample_tiny, requests):
    first, second = sample_tiny(requests), sample_tiny(requests)
    assert [(c.ids, c.logprobs) for c in first] == [(c.ids, c.logprobs) for c in second]


def test_another_seed_gives_other_tokens(sample_tiny, requests):
    others = [SamplingRequest(prompt_ids=r.prompt_ids, seed=r.seed + 1) for r in requests]
    pairs = zip(sample_tiny(requests), sample_tiny(others), strict=True)
    assert all(a.ids != b.ids for a, b in pairs)


def test_sampling_leaves_the_global_generator_unchanged(sample_tiny, requests):
    before = torch.get_rng_state()
    sample_tiny(requests)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_logprobs_match_the_trainer_at_the_temperature(sample_tiny, weights, requests, temperature):
    for request, completion in zip(requests, sample_tiny(requests, temperature=temperature), strict=True):
        expected = (logits_of(weights, request, completion) / temperature).log_softmax(-1)
        actual = torch.tensor(completion.logprobs)
        torch.testing.assert_close(actual, gather_logprobs(expected, completion.ids), atol=1e-4, rtol=0)


def test_temperature_0_samples_the_likeliest_token(sample_tiny, weights, requests):
    for request, completion in zip(requests, sample_tiny(requests, temperature=0.0), strict=True):
        logprobs = logits_of(weights, request, completion).log_softmax(-1)
        assert list(completion.ids) == logprobs.argmax(-1).tolist()
        actual = torch.tensor(completion.logprobs)
        torch.testing.assert_close(actual, gather_logprobs(logprobs, completion.ids), atol=1e-4, rtol=0)


@pytest.mark.parametrize("settings", [{"top_k": 3}, {"top_p": 0.6}, {"top_k": 5, "top_p": 0.5}])
def test_truncation_samples_allowed_tokens_and_renormalizes(sample_tiny, weights, requests, settings):
    for request, completion in zip(requests, sample_tiny(requests, temperature=1.2, **settings), strict=True):
        for logits, token, logprob in zip(
            logits_of(weights, request, completion) / 1.2, completion.ids, completion.logprobs, strict=True
        ):
            allowed = allowed_tokens(logits, **settings)
            assert token in allowed
            expected = logits[allowed].log_softmax(-1)[allowed.index(token)]
            assert logprob == pytest.approx(expected.item(), abs=1e-4)


def allowed_tokens(logits, top_k=0, top_p=1.0):
    """The top k tokens; of these, the fewest with at least top_p of their probability."""
    order = logits.argsort(descending=True).tolist()
    order = order[:top_k] if top_k else order
    mass, allowed = 0.0, []
    for token, share in zip(order, logits[order].softmax(-1).tolist(), strict=True):
        if mass >= top_p:
            break
        allowed.append(token)
        mass += share
    return allowed


def test_draws_follow_the_probabilities(sample_tiny, weights, requests):
    draws = 10_000
    many = [SamplingRequest(prompt_ids=requests[0].prompt_ids, seed=derive(1, i)) for i in range(draws)]
    first = [c.ids[0] for c in sample_tiny(many, batch_size=1000, max_new_tokens=1)]
    ids = torch.tensor([requests[0].prompt_ids])
    with torch.no_grad():
        shares = weights.model(input_ids=ids).logits[0, -1].double().softmax(-1)
    expected, observed = shares * draws, torch.bincount(torch.tensor(first), minlength=len(shares))
    kolmogorov_smirnov = (observed.cumsum(0) - expected.cumsum(0)).abs().max() / draws
    assert kolmogorov_smirnov < 1.63 / draws**0.5
    rare = expected < 5
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    observed = torch.cat([observed[~rare], observed[rare].sum()[None]])
    freedom = len(expected) - 1
    assert freedom > 20
    chi_square = ((observed - expected).square() / expected).sum()
    assert chi_square < freedom + 3 * (2 * freedom) ** 0.5


def test_completion_ends_with_its_end_token(sample_tiny, requests, end):
    plain = sample_tiny(requests, max_new_tokens=16)
    ends = {end, *(c.ids[5] for c in plain[:3])}  # tokens that are sampled
    cut = sample_tiny(requests, end_ids=tuple(ends), max_new_tokens=16)
    assert {c.finished for c in cut} == {True, False}
    for uncut, completion in zip(plain, cut, strict=True):
        stops = [i + 1 for i, token in enumerate(uncut.ids) if token in ends]
        assert completion.ids == uncut.ids[: stops[0] if stops else None]
        assert completion.finished == bool(stops)
        assert len(completion.logprobs) == len(completion.ids)


def test_completion_that_ends_at_the_limit_is_finished(sample_tiny, requests):
    one = requests[:1]
    ids = sample_tiny(one, max_new_tokens=4)[0].ids
    assert sample_tiny(one, end_ids=(ids[-1],), max_new_tokens=4)[0].finished


def test_stop_texts_end_a_completion_within_a_batch(sample_tiny, tiny_tokenizer, requests):
    plain = sample_tiny(requests, max_new_tokens=16)
    prefixes = [[tiny_tokenizer.decode(c.ids[:n]) for n in range(1, 17)] for c in plain]
    words = {tiny_tokenizer.decode(c.ids[n]) for c in plain[:3] for n in (5, 6, 7, 8)}
    stop = tuple(word for word in words if word.isascii() and word.isprintable())
    cut = sample_tiny(requests, max_new_tokens=16, stop=stop)
    assert {c.finished for c in cut} == {True, False}
    for uncut, so_far, completion in zip(plain, prefixes, cut, strict=True):
        stops = [n for n, text in enumerate(so_far, 1) if any(word in text for word in stop)]
        assert completion.ids == uncut.ids[: stops[0] if stops else None]
        assert completion.finished == (bool(stops) or uncut.finished)
        assert len(completion.logprobs) == len(completion.ids)


@pytest.fixture(scope="module")
def recorded_run(tiny_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("recorded") / "run"
    return train(make_spec(tiny_folder, rollout=rollout(completions_per_prompt=2)), folder)


def replay_spec(tiny_folder, recorded_run, **changes):
    backend = ReplayBackend(run=str(recorded_run))
    return make_spec(tiny_folder, rollout=rollout(completions_per_prompt=2, backend=backend), **changes)


def test_replayed_run_equals_the_recording(tiny_folder, recorded_run, tmp_path):
    replayed_run = train(replay_spec(tiny_folder, recorded_run), tmp_path / "again")
    assert metrics(replayed_run) == metrics(recorded_run)
    before, after = weights_of(recorded_run), weights_of(replayed_run)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_prompt_without_a_recorded_completion_is_an_error(tiny_folder, recorded_run, tmp_path):
    other = replay_spec(tiny_folder, recorded_run, training=training(seed=1))
    with pytest.raises(BadData, match="did not record a completion"):
        train(other, tmp_path / "other")


def test_folder_without_rollouts_is_an_error(tmp_path):
    with pytest.raises(BadData, match="holds no recorded rollouts"):
        ReplayRollouts(tmp_path)


def test_damaged_record_is_an_error_with_its_line(tmp_path):
    (tmp_path / "rollouts").mkdir()
    (tmp_path / "rollouts" / "step_000000.jsonl").write_text('{"seed": 1, "sampl\n')
    with pytest.raises(UnreadableInput, match=r"step_000000.jsonl:1: not a JSON object"):
        ReplayRollouts(tmp_path)
