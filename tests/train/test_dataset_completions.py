"""Completions from the data set: the token they end with, and those that are longer than a completion may be."""

import copy
from io import StringIO

import pytest
from rich.console import Console
from tinyruns import inline, lines, make_spec, metrics, resized, rollout, silent, train, training

from sdkit.language.specs import CrossEntropy, DatasetSamples, MixtureSamples, Table
from sdkit.train.preview import preview


def imitation(folder, sampled_by=None, max_new_tokens=32, **changes):
    parts = {
        "teacher": None,
        "rollout": rollout(sampled_by=sampled_by or DatasetSamples(), max_new_tokens=max_new_tokens),
        "losses": Table({"imitate": CrossEntropy()}),
        "training": training(steps=1, prompts_per_step=6),
    }
    return make_spec(folder, **(parts | changes))


@pytest.fixture(scope="module")
def other_end(tiny_folder, tmp_path_factory):
    """The tiny model, whose template ends turns with `<|end|>`; the tokenizer's own end token is another."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    folder = resized(tiny_folder, tmp_path_factory.mktemp("end") / "model", len(tokenizer) + 1)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    template = tokenizer.chat_template
    assert "<|im_end|>" in template
    tokenizer.chat_template = template.replace("<|im_end|>", "<|end|>")
    tokenizer.save_pretrained(folder)
    return folder, tokenizer.convert_tokens_to_ids("<|end|>")


def test_they_end_as_the_template_ends_a_turn(other_end, tmp_path):
    folder, end = other_end
    run = train(imitation(folder), tmp_path / "run")
    for record in lines(run / "rollouts" / "step_000000.jsonl"):
        assert record["completion_ids"][-1] == end
        assert record["finished"]


def test_a_sampled_completion_ends_there_too(other_end, open_tiny):
    folder, end = other_end
    trainer = open_tiny(imitation(folder))
    assert trainer.models.end_ids == (end, trainer.setup.data.tokenizer.eos_token_id)
    assert end in trainer.models.special_ids


def test_ends_of_the_models_own_settings_are_kept(tiny_folder, open_tiny):
    from sdkit.models.loading import end_ids

    trainer = open_tiny(imitation(tiny_folder))
    model = copy.copy(trainer.models.student.causal)
    model.generation_config = copy.deepcopy(model.generation_config)
    model.generation_config.eos_token_id = [7, trainer.models.end_ids[0], 9]
    assert end_ids(model, trainer.setup.data.tokenizer, 5) == (5, trainer.models.end_ids[0], 7, 9)


def lengths(tokenizer):
    """Tokens of each row's completion, end token included."""
    return [len(tokenizer(f"{i} + {i} = {2 * i}")["input_ids"]) + 1 for i in range(6)]


@pytest.mark.parametrize("room", [-1, 0])
def test_cut_ones_are_counted(tiny_folder, tiny_tokenizer, tmp_path, room):
    sizes = lengths(tiny_tokenizer)
    limit = max(sizes) + room
    cut = sum(size > limit for size in sizes)
    assert (cut > 0) == (room < 0)
    said = Console(file=StringIO(), width=300)
    run = train(imitation(tiny_folder, max_new_tokens=limit), tmp_path / "run", said)
    line = metrics(run)[0]
    assert line["rollout/cut_completions"] == pytest.approx(cut / 6)
    screen = said.file.getvalue()
    assert ("are cut" in screen) == (cut > 0)
    if not cut:
        assert not (run / "warnings.jsonl").exists()
        return
    assert f"{cut} of 6 completions in the column demonstration are cut" in screen
    assert f"set rollout.max_new_tokens: {max(sizes)}" in screen
    warning = lines(run / "warnings.jsonl")[0]
    assert warning["wire"] == "cut_completions"
    first = next(i for i, size in enumerate(sizes) if size > limit)
    assert f": row {first}" in warning["cause"]


def test_only_rows_that_the_run_uses_are_counted(tiny_folder, open_tiny):
    spec = imitation(tiny_folder, max_new_tokens=2, data=inline(40), training=training(steps=2, prompts_per_step=4))
    found = open_tiny(spec).setup.data.completions
    assert (found.rows, len(found.cut)) == (8, 8)
    assert ", …" in found.warning(2)


def test_of_a_mixture_the_students_own_are_not_counted(tiny_folder, tmp_path):
    mixed = MixtureSamples(student_share=1.0)
    run = train(imitation(tiny_folder, mixed, max_new_tokens=2), tmp_path / "run", silent())
    assert metrics(run)[0]["rollout/cut_completions"] == 0
    assert metrics(run)[0]["rollout/finished"] < 1
    own = train(make_spec(tiny_folder, training=training(steps=1)), tmp_path / "own")
    assert "rollout/cut_completions" not in metrics(own)[0]


@pytest.mark.parametrize(("limit", "title"), [(32, "8 tokens ─"), (3, "8 tokens, cut to 3")])
def test_the_plan_shows_the_end_and_the_cut(tiny_folder, tmp_path, tiny_tokenizer, limit, title):
    screen = Console(file=StringIO(), width=200)
    preview(imitation(tiny_folder, max_new_tokens=limit), tmp_path, 1, screen)
    title = title.replace("8", str(lengths(tiny_tokenizer)[0]))
    text = screen.file.getvalue()
    assert title in text
    assert ("0 + 0 = 0<|im_end|>" in text) == (limit > 3)
