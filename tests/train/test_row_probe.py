"""Probes of a model: the longest row that completions can share, and whether padding changes results."""

import pytest
import torch
import transformers
from tinyruns import COLUMNS, compute_token_statistics, make_spec, rollout, rollouts_of, training

from sdkit.language.errors import BadData
from sdkit.language.specs import DataSpec, InlineSource, Table
from sdkit.models.packing import pad_sequences, padded_tokens
from sdkit.models.weights import Weights
from sdkit.train import row_probe
from sdkit.train.row_probe import longest_shared, padding_shows, padding_shows_in_samples

CPU = torch.device("cpu")
SIZES = {
    "vocab_size": 404,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
WINDOW = 64
LONG, TEXT = 300, 150  # tokens of a shared row, and of the longest sequence in it


def build(architecture, **changes):
    config = getattr(transformers, f"{architecture}Config")(**(SIZES | changes))
    torch.manual_seed(0)
    return Weights(getattr(transformers, f"{architecture}ForCausalLM")(config).eval())


SLIDING = {
    "every layer": lambda: build("Mistral", sliding_window=WINDOW),
    "some layers": lambda: build(
        "Qwen2", sliding_window=WINDOW, use_sliding_window=True, layer_types=["full_attention", "sliding_attention"]
    ),
    "another model": lambda: build("Gemma2", sliding_window=WINDOW, head_dim=32),
}
NOT_SHARED = {
    "attention and recurrence": lambda: build(
        "FalconH1", mamba_d_ssm=64, mamba_n_heads=4, mamba_d_state=16, mamba_d_head=16
    ),
    "recurrence alone": lambda: build("Mamba"),
    "convolution": lambda: build("Lfm2", layer_types=["conv", "full_attention"]),
    "positions by distance in the row": lambda: build("Bloom", n_head=2, n_layer=2),
    "a kernel without such masks": lambda: with_kernel("flash_attention_2"),
}
UNLIMITED = {
    "plain": lambda: build("Llama"),
    "window switched off": lambda: build("Qwen2", sliding_window=WINDOW, use_sliding_window=False),
    "window longer than any row": lambda: build("Mistral", sliding_window=4096),
    "no positions": lambda: build("SmolLM3", no_rope_layers=[0, 0]),
}


def with_kernel(name):
    weights = build("Llama")
    weights.causal.config._attn_implementation = name
    weights.hidden = lambda _: pytest.fail("a kernel that takes no mask was tried")
    return weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SLIDING)
def test_shared_rows_are_limited_by_a_window(name, dtype, monkeypatch):
    weights = SLIDING[name]()
    weights.model.to(dtype)
    assert longest_shared(weights, CPU, LONG, TEXT) == WINDOW
    if dtype == torch.bfloat16:
        return
    # Without the window in the configuration, the probe measures it.
    monkeypatch.setattr(row_probe, "_attention_windows", lambda _: [])
    assert WINDOW // 2 < longest_shared(weights, CPU, LONG, TEXT) <= WINDOW


@pytest.mark.parametrize("name", NOT_SHARED)
def test_models_that_mix_completions_share_no_rows(name):
    assert longest_shared(NOT_SHARED[name](), CPU, LONG, TEXT) == 0


@pytest.mark.parametrize("name", UNLIMITED)
def test_other_models_share_rows_up_to_the_runs_limit(name):
    assert longest_shared(UNLIMITED[name](), CPU, LONG, TEXT) == LONG


def test_pass_with_a_row_longer_than_the_window_shares_no_rows():
    weights = SLIDING["every layer"]()
    draw = torch.Generator().manual_seed(1)

    def ids(size):
        return tuple(torch.randint(2, 404, (size,), generator=draw).tolist())

    prompt, long = ids(10), ids(90)
    prompts, completions = [prompt, prompt, long], [ids(8), ids(8), ids(8)]
    positions = [range(8)] * 3
    with torch.no_grad():
        packed = weights.hidden(pad_sequences(prompts, completions, positions, WINDOW, CPU))
        separate = [
            weights.hidden(pad_sequences([p], [c], [range(8)], 0, CPU))
            for p, c in zip(prompts, completions, strict=True)
        ]
    torch.testing.assert_close(packed, torch.cat(separate), atol=1e-5, rtol=1e-4)
    assert padded_tokens(prompts, completions, WINDOW) == 3 * 98
    assert padded_tokens(prompts[:2], completions[:2], WINDOW) == 10 + 16


LENGTH_DEPENDENT = {
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0] * 16,
        "long_factor": [4.0] * 16,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


@pytest.mark.parametrize("name", LENGTH_DEPENDENT)
def test_length_dependent_positions_are_detected(name):
    weights = build("Llama", max_position_embeddings=64, rope_scaling=LENGTH_DEPENDENT[name])
    assert padding_shows(weights, CPU, 200)
    assert not padding_shows(weights, CPU, 60)


@pytest.mark.parametrize("name", ["every layer", "attention and recurrence", "recurrence alone"])
def test_windows_and_recurrence_do_not_depend_on_padding(name, tiny_tokenizer):
    weights = (SLIDING | NOT_SHARED)[name]()
    assert not padding_shows(weights, CPU, 200)
    assert not padding_shows_in_samples(weights, tiny_tokenizer, (1,))


def ignore_mask(weights):
    """The model, made to ignore the padding mask."""
    forward = weights.causal.model.forward

    def without_mask(*args, attention_mask=None, position_ids=None, **kwargs):
        return forward(*args, **kwargs)

    weights.causal.model.forward = without_mask
    return weights


def test_sampler_that_depends_on_padding_is_detected(tiny_tokenizer):
    assert padding_shows_in_samples(ignore_mask(build("Llama")), tiny_tokenizer, (1,))
    assert not padding_shows_in_samples(build("Llama"), tiny_tokenizer, (1,))


def test_prompts_are_sampled_singly_if_padding_changes_samples(open_tiny, monkeypatch):
    monkeypatch.setattr("sdkit.train.row_probe.padding_shows_in_samples", lambda *_: True)
    trainer = open_tiny()
    assert trainer.sampler.backends.load(trainer.models.student, trainer.progress.optimizer_steps)[0].batch_size == 1


def test_run_is_refused_if_padding_changes_training(open_tiny, tiny_folder, monkeypatch):
    monkeypatch.setattr("sdkit.train.row_probe.padding_shows", lambda *_: True)
    with pytest.raises(BadData, match="other hidden states where it is padded") as caught:
        open_tiny()
    assert caught.value.path == ("model", "path")
    assert open_tiny(make_spec(tiny_folder, training=training(micro_batch_tokens=1)))


def test_run_with_a_window_trains_on_the_sampled_tokens(open_tiny, tiny_folder, tmp_path):
    folder = tmp_path / "sliding"
    SLIDING["every layer"]().causal.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(folder)
    rows = tuple(
        Table({"prompt": "the lazy dog " * 30 + str(i), "demonstration": "x", "answer": "y"}) for i in range(4)
    )
    data = DataSpec(source=InlineSource(rows=rows), columns=COLUMNS)
    trainer = open_tiny(make_spec(folder, data=data, rollout=rollout(completions_per_prompt=2)))
    assert 0 < trainer.models.longest_pack <= WINDOW < trainer.setup.longest_sequence
    for r in compute_token_statistics(trainer, rollouts_of(trainer), {"student_logprobs"}):
        logprobs = torch.tensor(r.token_statistics["student_logprobs"])
        torch.testing.assert_close(logprobs, torch.tensor(r.sampler_logprobs), atol=1e-4, rtol=1e-4)
