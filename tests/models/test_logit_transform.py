"""What a model computes from head × hidden is measured and applied in every loss, or refused."""

import pytest
import torch
import transformers
from tinyruns import (
    advance,
    compute_token_statistics,
    make_spec,
    masters,
    model,
    rollout,
    rollouts_of,
    teacher,
    train_step,
    training,
)
from transformers import AutoTokenizer

from sdkit.batches import LogitTransform
from sdkit.language.errors import BadData
from sdkit.language.specs import ExternalWeights
from sdkit.models.logit_transform import measure_transform
from sdkit.models.packing import pad_sequences
from sdkit.models.weights import Weights

CPU = torch.device("cpu")
SIZES = {
    "vocab_size": 404,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 1,
}


def build(architecture, text=None, **changes):
    """A random model, in evaluation mode.  text: changes to a nested text configuration."""
    config = getattr(transformers, f"{architecture}Config")
    sizes = {k: v for k, v in (SIZES | changes).items() if v != "default"}
    torch.manual_seed(0)
    if text is not None:
        config = config(text_config=sizes | text, vision_config=None, audio_config=None)
        return transformers.Gemma4ForConditionalGeneration(config).eval()
    config = getattr(transformers, f"{architecture}TextConfig", config)
    causal = getattr(transformers, f"{architecture}ForCausalLM")(config(**sizes)).eval()
    bias = causal.get_output_embeddings().bias
    if bias is not None:
        torch.nn.init.normal_(bias)
    return causal


NESTED = {
    "final_logit_softcapping": 5.0,
    "vocab_size_per_layer_input": 404,
    "hidden_size_per_layer_input": 0,
    "num_kv_shared_layers": 0,
    "global_head_dim": 32,
    "head_dim": 32,
}
MODELS = {
    "plain": (lambda: build("Llama"), 1.0, None),
    "softcap": (lambda: build("Gemma2", head_dim=32, final_logit_softcapping=7.0), 1.0, 7.0),
    "weak softcap": (lambda: build("Gemma2", head_dim=32, final_logit_softcapping=1e4), 1.0, 1e4),
    "nested softcap": (lambda: build("Gemma4", NESTED), 1.0, 5.0),
    "multiplied": (lambda: build("Cohere", logit_scale=0.0625), 0.0625, None),
    "divided": (lambda: build("Granite", logits_scaling=3.0), 1 / 3, None),
    "multiplied by another name": (lambda: build("HyperCLOVAX", logits_scaling=0.1), 0.1, None),
    "bias": (lambda: build("Phi"), 1.0, None),
    "base model under another name than the class says": (
        lambda: build(
            "Llama4",
            head_dim=32,
            intermediate_size_mlp=64,
            num_local_experts=2,
            layer_types=["chunked_attention", "full_attention"],
        ),
        1.0,
        None,
    ),
    "decoder called past the base model": (
        lambda: build("OPT", ffn_dim=64, word_embed_proj_dim=32, intermediate_size="default"),
        1.0,
        None,
    ),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transform_gives_the_models_logits(name, dtype):
    make, scale, softcap = MODELS[name]
    weights = Weights(make().to(dtype))
    with torch.no_grad():
        weights.head.mul_(5)  # so that a softcap has an effect
    assert weights.transform.scale == pytest.approx(scale, rel=1e-6)
    assert weights.transform.softcap == (softcap and pytest.approx(softcap, rel=1e-6))
    ids = tuple(range(3, 30))
    with torch.no_grad():
        expected = weights.model(torch.tensor([ids])).logits[0, 3:-1]
        batch = pad_sequences([ids[:4]], [ids[4:]], [range(len(ids) - 4)], 0, CPU)
        scores = weights.scores(batch)
        actual = scores.transform(scores.hidden @ scores.head.T)
    tolerance = {"atol": 0.2, "rtol": 0.05} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(actual, expected, **tolerance)


class Changed(transformers.LlamaForCausalLM):
    """A model with its own forward pass."""

    def forward(self, input_ids, **_):
        return transformers.modeling_outputs.CausalLMOutput(
            logits=self.compute(self.model(input_ids=input_ids).last_hidden_state)
        )


def _some_ids(self, hidden):
    logits = self.lm_head(hidden)
    return torch.cat([logits[..., :7], torch.full_like(logits[..., 7:9], -1e9), logits[..., 9:]], -1)


CHANGES = {
    "2 of 404 logits (such as that of token id 7)": _some_ids,
    "404 of 404": lambda self, hidden: self.lm_head(hidden).log_softmax(-1),
    "than a bias, a scale and a softcap": lambda self, hidden: self.lm_head(hidden).clamp(-50, 50),
    "further layers": lambda self, hidden: self.lm_head(hidden.flip(-1)),
    "one call": lambda self, hidden: hidden @ self.lm_head.weight.double().T,
    "one call of its": lambda self, hidden: self.lm_head(hidden) + self.lm_head(hidden),
    "further layers between": lambda self, hidden: self.lm_head(hidden[..., :3]),
    "cannot be measured": lambda self, hidden: self.lm_head(self.model.layers[0].mlp(hidden)),
    "the shape": lambda self, hidden: self.lm_head(hidden)[..., :9],
}


@pytest.mark.parametrize("message", CHANGES)
def test_transform_that_cannot_be_expressed_is_refused(message):
    causal = build("Llama")
    causal.__class__ = type("Own", (Changed,), {"compute": CHANGES[message]})
    with pytest.raises(BadData) as caught:
        measure_transform(causal)
    assert message in caught.value.message


def test_nonlinear_head_is_refused():
    causal = build("Llama")
    causal.lm_head.register_forward_hook(lambda _module, _args, output: output.relu())
    with pytest.raises(BadData, match="not linear"):
        measure_transform(causal)


def test_measuring_changes_no_model():
    causal = build("Gemma4", NESTED)
    ids = torch.arange(2, 12)[None]
    before = causal(ids).logits
    measure_transform(causal)
    torch.testing.assert_close(causal(ids).logits, before, rtol=0, atol=0)


@pytest.fixture(scope="module")
def folders(tiny_folder, tmp_path_factory):
    """Models with changed logits and the tiny tokenizer, by name."""
    root = tmp_path_factory.mktemp("changed")
    for name in ("nested softcap", "divided", "bias"):
        causal = MODELS[name][0]()
        causal.save_pretrained(root / name)
        AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(root / name)
    return root


def own_logprobs(causal, rollout_, prompt):
    ids = torch.tensor([[*prompt, *rollout_.completion_ids]])
    with torch.no_grad():
        return causal(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)


@pytest.mark.parametrize("name", ["nested softcap", "divided", "bias"])
def test_step_uses_the_logits_of_the_sampler(open_tiny, folders, name):
    trainer = open_tiny(make_spec(folders / name, rollout=rollout(completions_per_prompt=2)))
    rollouts = rollouts_of(trainer)
    expected = []
    for one in rollouts:
        student = own_logprobs(trainer.models.student.causal, one, one.prompt_ids)
        teacher = own_logprobs(trainer.models.teacher.weights.causal, one, one.teacher_prompt_ids)
        expected.append((teacher.exp() * (teacher - student)).sum(-1))
    measured = compute_token_statistics(trainer, rollouts, {"student_logprobs"})
    for one in measured:
        metrics = torch.tensor(one.token_statistics["student_logprobs"])
        torch.testing.assert_close(metrics, torch.tensor(one.sampler_logprobs), atol=1e-4, rtol=1e-4)
    metrics = train_step(trainer, rollouts).metrics
    assert metrics["loss"] == pytest.approx(float(torch.cat(expected).mean()), rel=1e-3)


def test_bias_trains_equally_when_sharded(open_tiny, folders):
    biases = []
    for stage in (0, 3):
        spec = make_spec(folders / "bias", training=training(zero_stage=stage))
        trainer = open_tiny(spec)
        name = next(n for n, _ in trainer.learner.masters() if n.endswith("lm_head.bias"))
        before = masters(trainer)[name]
        advance(trainer, 2)
        after = masters(trainer)[name]
        assert (after != before).all()
        biases.append(after)
    torch.testing.assert_close(biases[0], biases[1], atol=1e-5, rtol=1e-4)


def test_transform_error_of_a_model_names_its_key(open_tiny, tiny_folder, folders, monkeypatch):
    def refuse(causal, head_shape):
        if causal.config.model_type == "granite":
            raise BadData("refused")
        return LogitTransform()

    monkeypatch.setattr("sdkit.models.weights.measure_transform", refuse)
    external = teacher(ExternalWeights(path=str(folders / "divided")))
    with pytest.raises(BadData, match="refused") as caught:
        open_tiny(make_spec(tiny_folder, teacher=external))
    assert caught.value.path == ("teacher", "weights", "path")
    with pytest.raises(BadData, match="refused") as caught:
        open_tiny(make_spec(folders / "divided", model=model(folders / "divided")))
    assert caught.value.path == ("model", "path")
