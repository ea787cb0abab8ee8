"""Exported folders: other libraries load them with the trained weights."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from attrs import evolve
from tinyruns import LORA, QLORA, assert_equal, make_spec, model, train, training, weights_of, with_evaluation
from vllm_build import require_vllm

from sdkit.checkpoints import checkpoint
from sdkit.language.errors import BadData, BadEnvironment, UnreadableInput
from sdkit.language.specs import OptimizerSpec
from sdkit.runs.export import export

IDS = [5, 91, 17, 230, 44, 8, 120, 63]
NAMES = ["full", "lora", "qlora"]


def logprobs(causal):
    """Log-probabilities of every id after the first, in float32."""
    with torch.no_grad():
        all_logprobs = causal(torch.tensor([IDS])).logits[0, :-1].float().log_softmax(-1)
    return all_logprobs.gather(-1, torch.tensor(IDS[1:])[:, None])[:, 0]


@pytest.fixture(scope="module")
def runs(tiny_folder, tmp_path_factory):
    """A full run, one with adapters and one over 4-bit weights: spec, folder, and the log-probabilities of the trained weights."""
    results = {}
    save_model = checkpoint.save_model

    def save_and_record(student, tokenizer, run):
        with student.active() as causal:
            results[run.name] = [logprobs(causal)]
        return save_model(student, tokenizer, run)

    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save_model", save_and_record)
        for name, lora in zip(NAMES, (None, LORA, QLORA), strict=True):
            spec = make_spec(
                tiny_folder,
                model=model(tiny_folder, lora=lora),
                training=training(steps=2),
                optimizer=OptimizerSpec(lr=3e-2),
            )
            spec = with_evaluation(spec, teacher_lift=0) if lora is None else spec
            results[name] = (spec, train(spec, folder / name), *results.get(name, ()))
    return results


@pytest.fixture(scope="module")
def exported(runs, tmp_path_factory):
    """Folder with the kinds of export."""
    folder = tmp_path_factory.mktemp("exported")
    for name, source, merge in (
        ("full", "full", False),
        ("merged", "lora", True),
        ("adapter", "lora", False),
        ("merged over 4 bits", "qlora", True),
    ):
        spec, run, _ = runs[source]
        export(spec, run.parent, run, folder / name, merge=merge)
    return folder


@pytest.mark.parametrize(("name", "source"), [("full", "full"), ("merged", "lora"), ("merged over 4 bits", "qlora")])
def test_transformers_loads_the_trained_weights(runs, exported, tiny_folder, name, source):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _, run, trained = runs[source]
    causal = AutoModelForCausalLM.from_pretrained(exported / name)
    torch.testing.assert_close(logprobs(causal), trained, atol=1e-5, rtol=0)
    start = AutoModelForCausalLM.from_pretrained(tiny_folder)
    assert (logprobs(start) - trained).abs().max() > 1e-2
    for key, value in weights_of(run).items():
        assert_equal(causal.get_parameter(key).detach(), value)
    assert AutoTokenizer.from_pretrained(exported / name).chat_template


def test_peft_loads_the_adapter_and_its_base(runs, exported, tiny_folder):
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer

    trained = runs["lora"][2]
    tuned = AutoPeftModelForCausalLM.from_pretrained(exported / "adapter")
    torch.testing.assert_close(logprobs(tuned), trained, atol=1e-6, rtol=0)
    assert tuned.peft_config["default"].base_model_name_or_path == str(tiny_folder)
    assert AutoTokenizer.from_pretrained(exported / "adapter").chat_template
    assert not (exported / "adapter" / "config.json").exists()
    assert not (exported / "adapter" / "model.safetensors").exists()


def test_adapter_trained_over_4_bits_needs_them(runs, tiny_folder, tmp_path):
    """Over weights that transformers quantizes with the same settings it is the trained model, over the original ones not."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    spec, run, trained = runs["qlora"]
    message = export(spec, run.parent, run, tmp_path / "adapter", merge=False)
    assert "load the base in 4 bits (nf4, double quantization)" in message
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    quantized = AutoModelForCausalLM.from_pretrained(tiny_folder, quantization_config=nf4, dtype=torch.float32)
    tuned = PeftModel.from_pretrained(quantized, tmp_path / "adapter")
    tuned.train()  # otherwise bitsandbytes multiplies in bfloat16 where the CPU has instructions for it
    torch.testing.assert_close(logprobs(tuned), trained)
    original = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_folder), tmp_path / "adapter")
    assert (logprobs(original) - trained).abs().max() > 1e-2


@pytest.mark.full
def test_vllm_loads_merged_model_and_adapter(runs, exported, tiny_folder):
    require_vllm()
    scenario = Path(__file__).parents[1] / "support" / "vllm_export.py"
    folders = [exported / "merged", tiny_folder, exported / "adapter"]
    done = subprocess.run(
        [sys.executable, *map(str, (scenario, *folders)), json.dumps(IDS)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"},
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    logprobs_by_name = json.loads(done.stdout.splitlines()[-1])
    for name in ("merged", "adapter"):
        torch.testing.assert_close(torch.tensor(logprobs_by_name[name]), runs["lora"][2], atol=1e-4, rtol=0)


def test_tensors_are_stored_only_as_safetensors(exported):
    for folder in exported.iterdir():
        kinds = {p.suffix for p in folder.rglob("*") if p.is_file()}
        assert ".safetensors" in kinds
        assert kinds <= {".safetensors", ".json", ".jinja", ".md", ".txt"}
    assert not list(exported.rglob(".*"))


def test_model_card(runs, exported, tiny_folder):
    card = (exported / "full" / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head == {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["sdkit"]}
    provenance = json.loads((runs["full"][1] / "provenance.json").read_text())
    for words in (
        "# full",
        "objective: distil: forward KL(teacher‖student)",
        provenance["data"]["train"],
        f"torch {provenance['versions']['torch']}",
        "| sums | greedy | right |",
        "2 steps of 4 rollouts",
        "95 % intervals over prompts: Wilson's score interval, Tango's score interval",
        "too few to tell small differences from chance",
    ):
        assert words in card
    assert str(tiny_folder.parent) not in card
    adapter = (exported / "adapter" / "README.md").read_text()
    assert yaml.safe_load(adapter.split("---")[1])["library_name"] == "peft"
    assert "LoRA: rank 4, alpha 8" in adapter
    assert "Held-out" not in adapter


@pytest.mark.parametrize(
    ("path", "hub", "base"),
    [
        ("some/model", "some/model", "some/model"),
        ("bundled:smollm2-135m-instruct", None, "bundled:smollm2-135m-instruct"),
        ("here", None, "{folder}/here"),
    ],
)
def test_adapter_base_is_the_path_of_the_spec(runs, tmp_path, path, hub, base):
    spec, run, _ = runs["lora"]
    (tmp_path / "here").mkdir()
    spec = evolve(spec, model=evolve(spec.model, path=path, revision="v1"))
    export(spec, tmp_path, run, tmp_path / "out", merge=False)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == base.format(folder=tmp_path)
    assert config["revision"] == "v1"
    head = (tmp_path / "out" / "README.md").read_text().split("---")[1]
    assert yaml.safe_load(head).get("base_model") == hub


def test_existing_folder_is_not_overwritten(runs, tmp_path):
    spec, run, _ = runs["full"]
    (tmp_path / "old").mkdir()
    with pytest.raises(UnreadableInput, match="exists"):
        export(spec, run.parent, run, tmp_path / "old", merge=False)
    with pytest.raises(UnreadableInput, match="no adapter to merge"):
        export(spec, run.parent, run, tmp_path / "new", merge=True)
    assert [p.name for p in tmp_path.rglob("*")] == ["old"]


def test_unfinished_run_has_nothing_to_export(runs, tmp_path):
    with pytest.raises(UnreadableInput, match="no model/ yet"):
        export(runs["full"][0], tmp_path, tmp_path, tmp_path / "out", merge=False)


def test_damaged_weights_are_refused(runs, tmp_path):
    import shutil

    spec, run, _ = runs["full"]
    copy = shutil.copytree(run, tmp_path / "run")
    weights = copy / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(BadData, match="is damaged"):
        export(spec, run.parent, copy, tmp_path / "out", merge=False)
    assert not (tmp_path / "out").exists()


def test_unwritable_folder_leaves_no_file(runs, tmp_path):
    spec, run, _ = runs["full"]
    (tmp_path / "file").touch()
    with pytest.raises(BadEnvironment, match="cannot write"):
        export(spec, run.parent, run, tmp_path / "file" / "out", merge=False)
    assert [p.name for p in tmp_path.rglob("*")] == ["file"]
