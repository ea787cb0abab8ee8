"""Completions from the data set: their end token, and those longer than the limit."""

import copy
from io import StringIO

import pytest
from rich.console import Console
from tinyruns import inline, lines, make_spec, metrics, resize_model, rollout, silent_console, train, training

from sdkit.language.specs import CrossEntropy, DatasetSamples, MixtureSamples, Table
from sdkit.train.preview import preview


def imitation_spec(folder, sampled_by=None, max_new_tokens=32, **changes):
    parts = {
        "teacher": None,
        "rollout": rollout(sampled_by=sampled_by or DatasetSamples(), max_new_tokens=max_new_tokens),
        "losses": Table({"imitate": CrossEntropy()}),
        "training": training(steps=1, prompts_per_step=6),
    }
    return make_spec(folder, **(parts | changes))


@pytest.fixture(scope="module")
def model_with_other_end(tiny_folder, tmp_path_factory):
    """The tiny model with a template that ends turns with `<|end|>`, which is not the tokenizer's end token."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    folder = resize_model(tiny_folder, tmp_path_factory.mktemp("end") / "model", len(tokenizer) + 1)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    template = tokenizer.chat_template
    assert "<|im_end|>" in template
    tokenizer.chat_template = template.replace("<|im_end|>", "<|end|>")
    tokenizer.save_pretrained(folder)
    return folder, tokenizer.convert_tokens_to_ids("<|end|>")


def test_completions_end_with_the_templates_end_token(model_with_other_end, tmp_path):
    folder, end = model_with_other_end
    run = train(imitation_spec(folder), tmp_path / "run")
    for record in lines(run / "rollouts" / "step_000000.jsonl"):
        assert record["completion_ids"][-1] == end
        assert record["finished"]


def test_sampled_completions_stop_at_the_templates_end_token(model_with_other_end, open_tiny):
    folder, end = model_with_other_end
    trainer = open_tiny(imitation_spec(folder))
    assert trainer.models.end_ids == (end, trainer.setup.data.tokenizer.eos_token_id)
    assert end in trainer.models.special_ids


def test_end_tokens_of_the_model_are_kept(tiny_folder, open_tiny):
    from sdkit.models.loading import end_ids

    trainer = open_tiny(imitation_spec(tiny_folder))
    model = copy.copy(trainer.models.student.causal)
    model.generation_config = copy.deepcopy(model.generation_config)
    model.generation_config.eos_token_id = [7, trainer.models.end_ids[0], 9]
    assert end_ids(model, trainer.setup.data.tokenizer, 5) == (5, trainer.models.end_ids[0], 7, 9)


def lengths(tokenizer):
    """Tokens of each row's completion, end token included."""
    return [len(tokenizer(f"{i} + {i} = {2 * i}")["input_ids"]) + 1 for i in range(6)]


@pytest.mark.parametrize("offset", [-1, 0])
def test_truncated_completions_are_counted_and_reported(tiny_folder, tiny_tokenizer, tmp_path, offset):
    sizes = lengths(tiny_tokenizer)
    limit = max(sizes) + offset
    cut = sum(size > limit for size in sizes)
    assert (cut > 0) == (offset < 0)
    console = Console(file=StringIO(), width=300)
    run = train(imitation_spec(tiny_folder, max_new_tokens=limit), tmp_path / "run", console)
    line = metrics(run)[0]
    assert line["rollout/cut_completions"] == pytest.approx(cut / 6)
    output = console.file.getvalue()
    assert ("are cut" in output) == (cut > 0)
    if not cut:
        assert not (run / "warnings.jsonl").exists()
        return
    assert f"{cut} of 6 completions in the column demonstration are cut" in output
    assert f"set rollout.max_new_tokens: {max(sizes)}" in output
    warning = lines(run / "warnings.jsonl")[0]
    assert warning["wire"] == "cut_completions"
    first = next(i for i, size in enumerate(sizes) if size > limit)
    assert f": row {first}" in warning["cause"]


def test_only_rows_that_the_run_uses_are_counted(tiny_folder, open_tiny):
    spec = imitation_spec(
        tiny_folder, max_new_tokens=2, data=inline(40), training=training(steps=2, prompts_per_step=4)
    )
    completions = open_tiny(spec).setup.data.completions
    assert (completions.rows, len(completions.cut)) == (8, 8)
    assert ", …" in completions.warning(2)


def test_mixture_does_not_count_the_students_completions(tiny_folder, tmp_path):
    mixed = MixtureSamples(student_share=1.0)
    run = train(imitation_spec(tiny_folder, mixed, max_new_tokens=2), tmp_path / "run", silent_console())
    assert metrics(run)[0]["rollout/cut_completions"] == 0
    assert metrics(run)[0]["rollout/finished"] < 1
    without_dataset = train(make_spec(tiny_folder, training=training(steps=1)), tmp_path / "own")
    assert "rollout/cut_completions" not in metrics(without_dataset)[0]


@pytest.mark.parametrize(("limit", "title"), [(32, "8 tokens ─"), (3, "8 tokens, cut to 3")])
def test_plan_shows_end_token_and_truncation(tiny_folder, tmp_path, tiny_tokenizer, limit, title):
    screen = Console(file=StringIO(), width=200)
    preview(imitation_spec(tiny_folder, max_new_tokens=limit), tmp_path, 1, screen)
    title = title.replace("8", str(lengths(tiny_tokenizer)[0]))
    text = screen.file.getvalue()
    assert title in text
    assert ("0 + 0 = 0<|im_end|>" in text) == (limit > 3)
