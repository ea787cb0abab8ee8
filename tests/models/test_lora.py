"""Adapters: the loss reaches each, merged weights act as they do, and targets that cannot work are refused."""

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


def opened(folder, family="llama", targets="all-linear", lora=True):
    spec = model(folder, lora=evolve(LORA, target_modules=targets) if lora else None)
    return Weights(load_model(evolve(spec, attn_implementation=attention(family)), str(folder), 5))


def moved(weights):
    """The same weights, every factor of the adapter random."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in weights.model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.2)
    return weights


@torch.no_grad()
def states(weights):
    return weights.hidden(probes.probe_sequence(weights, CPU))


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_weights_teachers_and_saved_adapters_follow_what_is_attached(family, tmp_path):
    from peft import PeftModel

    folder = families.build(tmp_path / family, family)
    student = opened(folder, family)
    start = states(student)
    adapters.check(student, CPU, 0)
    assert torch.equal(states(student), start)  # the check leaves no trace
    plain = opened(folder, family, lora=False)
    assert torch.equal(states(plain), start)
    moved(student)
    own = states(student)
    assert probes.relative_difference(own, start) > 0.1

    def opened_teacher(spec):
        return open_teacher(spec, student, None, None).weights

    torch.testing.assert_close(states(opened_teacher(EmaWeights(update_rate=0.1))), own)
    assert torch.equal(states(opened_teacher(FrozenWeights())), start)
    merged = dict(student.named_tensors())
    assert set(merged) == set(dict(plain.causal.named_parameters()))
    plain.causal.load_state_dict(merged, strict=False)
    torch.testing.assert_close(states(plain), own, rtol=1e-3, atol=1e-3)
    student.model.save_pretrained(tmp_path / "adapter", selected_adapters=["default"])
    base = opened(folder, family, lora=False)
    reread = PeftModel.from_pretrained(base.causal, tmp_path / "adapter").eval()
    torch.testing.assert_close(states(Weights(reread)), own)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "gpt_oss"])
def test_a_run_with_experts_trains_each_kind_of_adapter_and_saves_it(open_tiny, tmp_path, family):
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
    merged = opened(saved, family, lora=False)
    torch.testing.assert_close(states(merged), states(trainer.models.student), rtol=1e-3, atol=1e-3)


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
def test_targets_that_cannot_work_are_refused_with_those_that_can(family, targets, message, tmp_path):
    folder = families.build(tmp_path / family, family)
    with pytest.raises(BadData, match=message) as refusal:
        opened(folder, family, targets)
    assert refusal.value.path == ("model", "lora", "target_modules")
    working = refusal.value.hint.partition(": ")[2].split(", ")
    assert "lm_head" not in working
    adapters.check(opened(folder, family, tuple(working)), CPU, 0)


def test_an_adapter_that_the_loss_does_not_reach_is_refused(tmp_path):
    folder = families.build(tmp_path / "llama", "llama")
    weights = opened(folder)
    for layer in weights.causal.model.layers:
        layer.mlp.down_proj.forward = layer.mlp.down_proj.base_layer.forward
    with pytest.raises(BadData, match=r"does not reach the adapter of .*down_proj"):
        adapters.check(weights, CPU, 0)


def test_an_adapter_whose_merge_is_something_else_is_refused(tmp_path):
    folder = families.build(tmp_path / "llama", "llama")
    weights = opened(folder)
    for layer in weights.causal.model.layers:
        layer.mlp.up_proj.get_delta_weight = lambda adapter: torch.zeros(128, 64)
    with pytest.raises(BadData, match=r"merged weights of .*up_proj do not act"):
        adapters.check(weights, CPU, 0)


def test_a_layer_that_returns_no_tensor_is_refused_and_not_recommended(tmp_path):
    folder = families.build(tmp_path / "phimoe", "phimoe")
    with pytest.raises(BadData, match="does not run with these adapters") as refusal:
        adapters.check(opened(folder, "phimoe"), CPU, 0)
    working = tuple(refusal.value.hint.partition(": ")[2].split(", "))
    assert "router" not in working
    adapters.check(opened(folder, "phimoe", working), CPU, 0)


def test_layers_that_share_their_weights_are_refused(tmp_path, monkeypatch):
    import transformers

    folder = families.build(tmp_path / "llama", "llama")
    read = transformers.AutoModelForCausalLM.from_pretrained

    def tied(*args, **kwargs):
        found = read(*args, **kwargs)
        first, second = found.model.layers
        second.mlp.up_proj.weight = first.mlp.up_proj.weight
        return found

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", tied)
    with pytest.raises(BadData, match="shares its weights"):
        opened(folder)
    adapters.check(opened(folder, targets=("q_proj",)), CPU, 0)


def test_fused_experts_are_refused_where_their_parameters_are_sharded(tmp_path):
    folder = families.build(tmp_path / "mixtral", "mixtral")
    with pytest.raises(BadData, match="zero_stage: 3") as refusal:
        adapters.check(opened(folder, "mixtral"), CPU, 3)
    working = tuple(refusal.value.hint.partition(": ")[2].split(", "))
    adapters.check(opened(folder, "mixtral", working), CPU, 3)


def test_a_folder_with_an_adapter_is_no_model(tmp_path):
    folder = families.build(tmp_path / "llama", "llama")
    opened(folder).model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(BadData, match="is a PEFT adapter, not a model"):
        opened(tmp_path / "adapter", lora=False)
    opened(folder).model.save_pretrained(folder)
    with pytest.raises(BadData, match="is a PEFT adapter, not a model"):
        opened(folder, lora=False)


def test_logits_are_measured_without_adapters(tmp_path):
    student = opened(families.build(tmp_path / "llama4", "llama4_text"))
    assert student.transform.scale == 1
    with pytest.raises(BadData, match=r"model\.lora\.target_modules: the model does not run") as caught:
        adapters.check(student, CPU, 0)  # its routers return two tensors
    assert "q_proj" in caught.value.hint
    assert "router" not in caught.value.hint


def test_a_layer_that_peft_refuses_is_not_offered(tmp_path):
    with pytest.raises(BadData, match="'out_proj' is incompatible") as caught:
        opened(families.build(tmp_path / "hybrid", "falcon_h1"))
    assert "o_proj" in caught.value.hint
    assert "out_proj" not in caught.value.hint
