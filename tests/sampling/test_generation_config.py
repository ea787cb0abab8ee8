"""The checkpoint's `generation_config` never changes what is sampled."""

import json
from shutil import copytree

import pytest
import torch
from tinyruns import distil, lines, make_spec, metrics, rollout, train, training, with_evaluation
from transformers import AutoModelForCausalLM, GenerationConfig

from sdkit.batches import SamplingParams, SamplingRequest
from sdkit.language.specs import ImportanceSpec, SamplerRatio, VllmBackend
from sdkit.models.weights import Weights
from sdkit.sampling.transformers import TransformersRollouts, own_settings
from sdkit.sampling.vllm_settings import engine_settings, sampling_settings
from sdkit.seeds import derive

SETTINGS = {"temperature": 0.8, "top_p": 1.0, "top_k": 0, "max_new_tokens": 10}
COMMON = list(range(40, 90))

# Without sdkit's own settings, each of these changes tokens or log-probabilities or raises an error.
CHECKPOINT_SETTINGS = {
    "repetition_penalty": {"repetition_penalty": 1.3},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 3.0},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 1},
    "sequence_bias": {"sequence_bias": [[[i], 9.0] for i in COMMON]},
    "bad_words_ids": {"bad_words_ids": [[i] for i in COMMON]},
    "suppress_tokens": {"suppress_tokens": COMMON},
    "begin_suppress_tokens": {"begin_suppress_tokens": COMMON},
    "forced_eos_token_id": {"forced_eos_token_id": 7},
    "min_length": {"min_length": 500},
    "min_new_tokens": {"min_new_tokens": 10},
    "guidance_scale": {"guidance_scale": 2.0},
    "num_beams": {"num_beams": 3, "length_penalty": 2.0, "early_stopping": True},
    "beam_groups": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0},
    "num_return_sequences": {"num_return_sequences": 2, "do_sample": True},
    "force_words_ids": {"force_words_ids": [[7]], "num_beams": 2},
    "penalty_alpha": {"penalty_alpha": 0.6, "top_k": 4},
    "dola_layers": {"dola_layers": "low"},
    "prompt_lookup": {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1},
    "assistant_early_exit": {"assistant_early_exit": 1},
    "max_time": {"max_time": 1e-9},
    "static_cache": {"cache_implementation": "static"},
    "no_cache": {"use_cache": False},
    "quantized_cache": {"cache_implementation": "quantized", "cache_config": {"nbits": 3}},
    "outputs": {"return_dict_in_generate": True, "output_scores": True},
    "token_healing": {"token_healing": True},
}


@pytest.fixture(scope="module")
def weights(tiny_folder):
    return Weights(AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32))


@pytest.fixture(scope="module")
def requests(tiny_tokenizer):
    texts = [f"What is {i} + {3 * i}?" + " How many letters?" * (i % 3) for i in range(6)]
    ids = [tuple(tiny_tokenizer(text)["input_ids"]) for text in texts]
    return [SamplingRequest(prompt_ids=prompt_ids, seed=derive(3, i)) for i, prompt_ids in enumerate(ids)]


def sample(weights, tokenizer, requests, **changes):
    backend = TransformersRollouts(tokenizer, 4, (tokenizer.eos_token_id,))
    backend.load(weights, 0)
    done = backend.sample(requests, SamplingParams(**(SETTINGS | changes)))
    return [(c.ids, c.logprobs, c.finished) for c in done]


@pytest.mark.parametrize("name", CHECKPOINT_SETTINGS)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_generation_config_changes_no_sample(weights, tiny_tokenizer, requests, name, temperature):
    plain = sample(weights, tiny_tokenizer, requests, temperature=temperature)
    causal, before = weights.causal, weights.causal.generation_config
    causal.generation_config = config = GenerationConfig(**CHECKPOINT_SETTINGS[name])
    try:
        with_settings_of_checkpoint = sample(weights, tiny_tokenizer, requests, temperature=temperature)
        assert causal.generation_config is config, "sampling must leave the model's settings alone"
    finally:
        causal.generation_config = before
    assert with_settings_of_checkpoint == plain


def test_generate_reads_no_field_of_the_generation_config(weights):
    """Covers every field of this version of transformers, listed above or not."""
    sentinel = object()
    config = GenerationConfig()
    fields = [name for name in vars(config) if not name.startswith("_")]
    assert {"repetition_penalty", "num_beams", "eos_token_id", "max_time"} <= set(fields)
    for name in [*fields, "an_entry_of_its_own"]:
        setattr(config, name, sentinel)
    causal, before = weights.causal, weights.causal.generation_config
    causal.generation_config = config
    try:
        with own_settings(causal, {"do_sample": False, "max_new_tokens": 3}) as settings:
            used, rest = causal._prepare_generation_config(settings)
            assert not [name for name, value in vars(used).items() if value is sentinel]
            assert sentinel not in rest.values()
            assert (used.max_new_tokens, used.num_beams, used.use_cache) == (3, 1, True)
        assert causal.generation_config is config
    finally:
        causal.generation_config = before


def test_generation_config_is_restored_after_an_error(weights):
    before = weights.causal.generation_config
    with pytest.raises(ZeroDivisionError), own_settings(weights.causal, {}):
        1 / 0  # noqa: B018
    assert weights.causal.generation_config is before


def copy_with_settings(source, target, **settings):
    """A copy of the model with these settings in its generation_config.json."""
    path = copytree(source, target) / "generation_config.json"
    current = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(current | settings))
    return target


def test_generation_config_changes_no_run_and_no_evaluation(tiny_folder, tmp_path):
    settings = {"repetition_penalty": 1.5, "suppress_tokens": COMMON, "num_beams": 3}
    other = copy_with_settings(tiny_folder, tmp_path / "model", **settings, max_length=7)
    changes = {
        "training": training(steps=1),
        "rollout": rollout(max_new_tokens=8),
        "losses": distil(importance=ImportanceSpec(sampler=SamplerRatio(cap=10.0, level="token"))),
    }
    runs = [
        train(with_evaluation(make_spec(folder, **changes)), tmp_path / name)
        for name, folder in {"plain": tiny_folder, "other": other}.items()
    ]
    plain, with_settings_of_checkpoint = (metrics(run) for run in runs)
    assert with_settings_of_checkpoint == plain
    ratios = [line["distil/sampler_ratio"] for line in plain if "distil/sampler_ratio" in line]
    assert ratios == pytest.approx([1.0], abs=1e-3)
    recorded = [lines(run / "rollouts" / "step_000000.jsonl") for run in runs]
    assert recorded[0] == recorded[1]
    saved = json.loads((runs[1] / "model" / "generation_config.json").read_text())
    assert settings.items() <= saved.items()


def test_vllm_ignores_the_generation_config():
    assert engine_settings(VllmBackend(), "float32", 100)["generation_config"] == "vllm"
    request_settings = sampling_settings(SamplingParams(**SETTINGS), [1], 404)
    neutral = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
    assert (neutral | {"min_p": 0.0, "min_tokens": 0}).items() <= request_settings.items()
