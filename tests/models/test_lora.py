"""Adapters: the loss reaches each, merged weights are equivalent, and unsuitable targets are refused."""

import re

import families
import pytest
import torch
from attrs import evolve
from tinyruns import LORA, advance, make_spec, model, teacher, training

from sdkit.checkpoints.checkpoint import save_model
from sdkit.language.errors import BadData
from sdkit.language.specs import EmaWeights, FrozenWeights
from sdkit.models import lora as adapters
from sdkit.models import probes
from sdkit.models.loading import load_model
from sdkit.models.teachers import open_teacher
from sdkit.models.weights import Weights, adapter_layers

CPU = torch.device("cpu")
FAMILIES = ["llama", "gpt2", "falcon", "mixtral", "qwen2_moe", "gpt_oss"]


def attention(family):
    return "eager" if family in families.EAGER else "sdpa"


def open_weights(folder, family="llama", targets="all-linear", lora=True, dtype="float32"):
    spec = model(folder, dtype, lora=evolve(LORA, target_modules=targets) if lora else None)
    return Weights(load_model(evolve(spec, attn_implementation=attention(family)), str(folder), 5))


def randomize_adapters(weights):
    """Set every adapter factor to random numbers; returns `weights`."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in weights.model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.2)
    return weights


@torch.no_grad()
def hidden_states(weights):
    return weights.hidden(probes.probe_sequence(weights, CPU))


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_weights_teachers_and_saved_adapters_are_equivalent(family, tmp_path):
    from peft import PeftModel

    folder = families.build(tmp_path / family, family)
    student = open_weights(folder, family)
    start = hidden_states(student)
    adapters.check(student, CPU, 0)
    assert torch.equal(hidden_states(student), start)  # the check changes nothing
    plain = open_weights(folder, family, lora=False)
    assert torch.equal(hidden_states(plain), start)
    randomize_adapters(student)
    adapted = hidden_states(student)
    assert probes.relative_difference(adapted, start) > 0.1

    def open_teacher_weights(spec):
        return open_teacher(spec, student, None, None).weights

    torch.testing.assert_close(hidden_states(open_teacher_weights(EmaWeights(update_rate=0.1))), adapted)
    assert torch.equal(hidden_states(open_teacher_weights(FrozenWeights())), start)
    merged = dict(student.named_tensors())
    assert set(merged) == set(dict(plain.causal.named_parameters()))
    plain.causal.load_state_dict(merged, strict=False)
    torch.testing.assert_close(hidden_states(plain), adapted, rtol=1e-3, atol=1e-3)
    student.model.save_pretrained(tmp_path / "adapter", selected_adapters=["default"])
    base = open_weights(folder, family, lora=False)
    reread = PeftModel.from_pretrained(base.causal, tmp_path / "adapter").eval()
    torch.testing.assert_close(hidden_states(Weights(reread)), adapted)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "gpt_oss"])
def test_run_with_experts_trains_and_saves_each_kind_of_adapter(open_tiny, tmp_path, family):
    folder = families.build(tmp_path / family, family)
    spec = make_spec(
        folder,
        model=evolve(model(folder, lora=LORA), attn_implementation=attention(family)),
        teacher=teacher(EmaWeights(update_rate=0.1)),
        training=training(zero_stage=1),
    )
    trainer = open_tiny(spec)
    advance(trainer, 1)
    assert all(layer.lora_B["default"].weight.any() for layer in adapter_layers(trainer.models.student.model))
    saved = save_model(trainer.models.student, trainer.setup.data.tokenizer, tmp_path)
    merged = open_weights(saved, family, lora=False)
    torch.testing.assert_close(hidden_states(merged), hidden_states(trainer.models.student), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("family", "targets", "message"),
    [
        ("llama", ("q_proj", "lm_head"), '"lm_head" is the output projection'),
        ("llama", ("embed_tokens",), '"embed_tokens" is the embedding'),
        ("llama", ("model.embed_tokens",), "is the embedding"),
        ("gpt2", ("wte",), '"wte" is the embedding'),
        ("gpt2", ("c_attn", "wpe"), "transformer.wpe is no linear layer"),
        ("llama", ("nothing",), "nothing"),
        ("llama", ("q_proj", "nothing"), 'no layer is called "nothing"'),
        ("llama", ("norm",), "model.norm is no linear layer"),
        ("mixtral", ("q_proj", "w1"), "w1 without also targeting w3"),
        ("mixtral", ("q_proj", "experts"), "experts is no linear layer"),
    ],
)
def test_unsuitable_targets_are_refused_with_suitable_ones(family, targets, message, tmp_path):
    folder = families.build(tmp_path / family, family)
    with pytest.raises(BadData, match=message) as refusal:
        open_weights(folder, family, targets)
    assert refusal.value.path == ("model", "lora", "target_modules")
    working = refusal.value.hint.partition(": ")[2].split(", ")
    assert "lm_head" not in working
    adapters.check(open_weights(folder, family, tuple(working)), CPU, 0)


def test_adapter_that_the_loss_does_not_reach_is_refused(tmp_path):
    folder = families.build(tmp_path / "llama", "llama")
    weights = open_weights(folder)
    for layer in weights.causal.model.layers:
        layer.mlp.down_proj.forward = layer.mlp.down_proj.base_layer.forward
    with pytest.raises(BadData, match=r"does not reach the adapter of .*down_proj"):
        adapters.check(weights, CPU, 0)


def test_adapter_whose_merge_differs_is_refused(tmp_path):
    folder = families.build(tmp_path / "llama", "llama")
    weights = open_weights(folder)
    for layer in weights.causal.model.layers:
        layer.mlp.up_proj.get_delta_weight = lambda adapter: torch.zeros(128, 64)
    with pytest.raises(BadData, match=r"merged weights of .*up_proj do not act"):
        adapters.check(weights, CPU, 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_rounding_of_large_outputs_is_no_wrong_merge(family, tmp_path):
    """In bfloat16, an adapter's effect is within a few rounding errors of outputs of a hundred times its size."""
    folder = families.build(tmp_path / family, family)
    weights = open_weights(folder, family, dtype="bfloat16")
    with torch.no_grad():
        for name, parameter in weights.causal.named_parameters():
            if re.search(r"(v_proj|c_attn|query_key_value)\.base_layer\.weight", name):
                parameter.mul_(200)
    adapters.check(weights, CPU, 0)


def test_layer_that_returns_no_tensor_is_refused_and_not_suggested(tmp_path):
    folder = families.build(tmp_path / "phimoe", "phimoe")
    with pytest.raises(BadData, match="does not run with these adapters") as refusal:
        adapters.check(open_weights(folder, "phimoe"), CPU, 0)
    working = tuple(refusal.value.hint.partition(": ")[2].split(", "))
    assert "router" not in working
    adapters.check(open_weights(folder, "phimoe", working), CPU, 0)


def test_layers_that_share_weights_are_refused(tmp_path, monkeypatch):
    import transformers

    folder = families.build(tmp_path / "llama", "llama")
    read = transformers.AutoModelForCausalLM.from_pretrained

    def load_with_shared_weights(*args, **kwargs):
        loaded = read(*args, **kwargs)
        first, second = loaded.model.layers
        second.mlp.up_proj.weight = first.mlp.up_proj.weight
        return loaded

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load_with_shared_weights)
    with pytest.raises(BadData, match="shares its weights"):
        open_weights(folder)
    adapters.check(open_weights(folder, targets=("q_proj",)), CPU, 0)


def test_fused_experts_are_refused_under_stage_3(tmp_path):
    folder = families.build(tmp_path / "mixtral", "mixtral")
    with pytest.raises(BadData, match="zero_stage: 3") as refusal:
        adapters.check(open_weights(folder, "mixtral"), CPU, 3)
    working = tuple(refusal.value.hint.partition(": ")[2].split(", "))
    adapters.check(open_weights(folder, "mixtral", working), CPU, 3)


def test_folder_with_an_adapter_is_no_model(tmp_path):
    folder = families.build(tmp_path / "llama", "llama")
    open_weights(folder).model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(BadData, match="is a PEFT adapter, not a model"):
        open_weights(tmp_path / "adapter", lora=False)
    open_weights(folder).model.save_pretrained(folder)
    with pytest.raises(BadData, match="is a PEFT adapter, not a model"):
        open_weights(folder, lora=False)


def test_logit_transform_is_measured_without_adapters(tmp_path):
    student = open_weights(families.build(tmp_path / "llama4", "llama4_text"))
    assert student.transform.scale == 1
    with pytest.raises(BadData, match=r"model\.lora\.target_modules: the model does not run") as caught:
        adapters.check(student, CPU, 0)  # its routers return two tensors
    assert "q_proj" in caught.value.hint
    assert "router" not in caught.value.hint


def test_layer_that_peft_refuses_is_not_suggested(tmp_path):
    with pytest.raises(BadData, match="'out_proj' is incompatible") as caught:
        open_weights(families.build(tmp_path / "hybrid", "falcon_h1"))
    assert "o_proj" in caught.value.hint
    assert "out_proj" not in caught.value.hint
