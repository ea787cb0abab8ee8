"""Base weights in 4 bits: every use of a weight has the same rounded values, and adapters train on top of them."""

import importlib.util
import json
import shutil

import pytest
import torch
from attrs import evolve
from test_lora import CPU, hidden_states, randomize_adapters
from tinyruns import QLORA, advance, make_spec, model, teacher, training, weights_of
from tinyruns import hidden_states as probe_states

from sdkit.checkpoints.checkpoint import save_model
from sdkit.language.errors import BadData, BadEnvironment
from sdkit.language.specs import EmaWeights, FrozenWeights
from sdkit.models import lora as adapters
from sdkit.models import operations, probes
from sdkit.models.loading import load_model
from sdkit.models.quantization import quant_state, quantize
from sdkit.models.teachers import open_teacher
from sdkit.models.weights import Weights


def load(folder, dtype="float32", lora=QLORA):
    return Weights(load_model(model(folder, dtype, lora), str(folder), 5).to(CPU), "default" if lora else None)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merged_weights_and_teachers_have_the_rounded_values(tiny_folder, dtype):
    plain, student = load(tiny_folder, dtype, None), load(tiny_folder, dtype)
    rounding = 0.1  # of a value, on average
    rounded = hidden_states(student)
    assert 0.01 < probes.relative_difference(rounded, hidden_states(plain)) < 4 * rounding
    adapters.check(student, CPU, 0)
    assert torch.equal(hidden_states(student), rounded)
    frozen = open_teacher(FrozenWeights(), student, None, None).weights
    average = open_teacher(EmaWeights(update_rate=0.1), student, None, None).weights
    randomize_adapters(student)
    adapted = hidden_states(student)
    assert probes.relative_difference(adapted, rounded) > 0.1
    assert torch.equal(hidden_states(frozen), rounded)
    assert torch.equal(hidden_states(average), rounded)
    types = {p.dtype for name, p in student.model.named_parameters() if quant_state(p) is None}
    assert types == {getattr(torch, dtype)}  # adapters as well
    for weights, expected, tolerance in (
        (frozen, rounded, 0.0),
        (student, adapted, 1e-4 if dtype == "float32" else 0.1),
    ):
        merged = dict(weights.named_tensors())
        assert set(merged) == set(dict(plain.causal.named_parameters()))
        plain.causal.load_state_dict(merged, strict=False)
        assert probes.relative_difference(hidden_states(plain), expected) <= tolerance


def test_only_linear_layers_of_the_decoder_are_quantized(tiny_folder):
    student = load(tiny_folder)
    sizes = {name: (p, quant_state(p)) for name, p in student.causal.named_parameters() if ".lora_" not in name}
    quantized = {name for name, (_, state) in sizes.items() if state is not None}
    assert quantized == {name for name in sizes if "_proj." in name}
    full = dict(load(tiny_folder, lora=None).causal.named_parameters())
    for name in quantized:
        assert sizes[name][0].nbytes == full[name.replace(".base_layer", "")].nbytes / 8
    plain = load(tiny_folder, lora=None)
    assert operations.model_shape(student) == operations.model_shape(plain)


def test_state_dict_restores_the_scales(tiny_folder):
    student = load(tiny_folder)
    before, state = hidden_states(student), {name: t.clone() for name, t in student.model.state_dict().items()}
    for _, parameter in student.model.named_parameters():
        if quant_state(parameter) is not None:
            quant_state(parameter).absmax.zero_()
    assert not torch.equal(hidden_states(student), before)
    student.model.load_state_dict(state)
    assert torch.equal(hidden_states(student), before)


def test_run_trains_adapters_and_saves_what_it_sampled_with(open_tiny, tiny_folder, tmp_path):
    spec = make_spec(
        tiny_folder,
        model=evolve(model(tiny_folder, lora=QLORA), activation_checkpointing=True),
        teacher=teacher(EmaWeights(update_rate=0.1)),
        training=training(zero_stage=2),
    )
    trainer = open_tiny(spec)
    base = {n: p.clone() for n, p in trainer.models.student.model.named_parameters() if not p.requires_grad}
    start = probe_states(trainer, trainer.models.student)
    advance(trainer, 2)
    trained = probe_states(trainer, trainer.models.student)
    assert not torch.equal(trained, start)
    assert all(torch.equal(p, base[n]) for n, p in trainer.models.student.model.named_parameters() if ".base_" in n)
    saved = save_model(trainer.models.student, trainer.setup.data.tokenizer, tmp_path)
    assert "quantization_config" not in (saved / "config.json").read_text()
    reread = load(saved, lora=None)
    torch.testing.assert_close(probe_states(trainer, reread), trained, rtol=1e-4, atol=1e-4)
    assert {value.dtype for value in weights_of(tmp_path).values()} == {torch.float32}


def test_model_without_linear_layers_is_refused():
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.device("meta"):
        other = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=40))
    with pytest.raises(BadData, match="no linear layers to quantize") as caught:
        quantize(other)
    assert caught.value.path == ("model", "lora", "quantize_base")


def test_weights_that_are_stored_quantized_are_refused(open_tiny, tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "quantized")
    config = json.loads((folder / "config.json").read_text())
    stored = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": stored}))
    with pytest.raises(BadData, match="quantized weights, which cannot be trained") as caught:
        open_tiny(make_spec(folder, model=model(folder, lora=QLORA)))
    assert caught.value.path == ("model", "path")


def test_missing_package_is_named_before_the_weights_are_read(tiny_folder, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    with pytest.raises(BadEnvironment, match="missing: bitsandbytes") as caught:
        load_model(model(tiny_folder, lora=QLORA), str(tiny_folder), 5, read=None)
    assert caught.value.path == ("model", "lora", "quantize_base")
    assert caught.value.hint == "pip install 'sdkit[bitsandbytes]'"
