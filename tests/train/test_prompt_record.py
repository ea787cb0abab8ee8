"""Chat templates that print the date: a run keeps its date and recognizes its prompts."""

import json
from datetime import datetime
from io import StringIO

import pytest
from attrs import evolve
from rich.console import Console
from tinyruns import distil, lines, make_spec, metrics, train, training, with_evaluation
from transformers import AutoTokenizer

from sdkit.language.errors import BadData, UnreadableInput
from sdkit.language.specs import DataSpec, InlineSource, OutputSpec, ReplayBackend, ReverseKl, Table
from sdkit.train import prompt_record
from sdkit.train.inputs import RunData
from sdkit.train.replay import open_recording

DATED = "{{ strftime_now('%d %b %Y %H:%M:%S.%f') }}\n"
FIXED = datetime(2024, 7, 26, 12, 30, 15, 250)


def copy_with_date(folder, target, before=DATED):
    """A copy of the model with a template that prints the date to the microsecond."""
    import shutil

    shutil.copytree(folder, target)
    tokenizer = AutoTokenizer.from_pretrained(target)
    tokenizer.chat_template = before + tokenizer.chat_template
    tokenizer.save_pretrained(target)
    return target


@pytest.fixture(scope="module")
def spec(tiny_folder, tmp_path_factory):
    model = copy_with_date(tiny_folder, tmp_path_factory.mktemp("dated") / "model")
    output = OutputSpec(checkpoint_every=1, trackers=())
    return with_evaluation(make_spec(model, training=training(steps=2), output=output), teacher_lift=0)


@pytest.fixture(scope="module")
def run(spec, tmp_path_factory):
    return train(spec, tmp_path_factory.mktemp("runs") / "run")


def prompt_dates(folder):
    """The dates in all prompts of student and teacher in a run."""
    texts = [line for path in (folder / "samples").glob("*.jsonl") for line in lines(path)]
    return {line[key].partition("\n")[0] for line in texts for key in ("prompt", "teacher_prompt")}


def change_template(spec, text):
    """Changes the text that the template prints; returns a function that restores it."""
    from pathlib import Path

    path = Path(spec.model.path) / "chat_template.jinja"
    before = path.read_text()
    path.write_text(before.replace("strftime_now(", f"'{text}' ~ strftime_now("))
    return lambda: path.write_text(before)


def test_all_prompts_of_a_run_have_one_date(run):
    record = json.loads((run / "provenance.json").read_text())["prompts"]
    date = datetime.fromisoformat(record["date"])
    assert prompt_dates(run) == {date.strftime("%d %b %Y %H:%M:%S.%f")}
    assert record["rows"] == 6
    assert set(record["sha256"]) == {
        f"{name}{suffix}" for name in ("train", "suite sums", "suite more") for suffix in ("", " (teacher)")
    }


def test_resumed_run_keeps_its_date(spec, tmp_path):
    folder = train(spec, tmp_path / "run")
    longer = evolve(spec, training=training(steps=3))
    train(longer, folder, resume=True)
    assert len(prompt_dates(folder)) == 1


def test_replay_has_the_date_of_the_recording(spec, run, tmp_path):
    other = evolve(spec, losses=distil(divergence=ReverseKl()))
    folder = train(other, tmp_path / "replay", recording=open_recording(f"{run}@0"))
    assert prompt_dates(folder) == prompt_dates(run)
    backend = evolve(spec.rollout, backend=ReplayBackend(run=str(run)))
    again = train(evolve(spec, rollout=backend), tmp_path / "again")
    assert prompt_dates(again) == prompt_dates(run)
    losses = [[line["loss"] for line in metrics(each) if "loss" in line] for each in (run, again)]
    assert losses[0] == losses[1] != []


def test_changed_template_is_refused(spec, run, tmp_path):
    """Even if the changed files of the tokenizer are accepted."""
    undo = change_template(spec, "now: ")
    try:
        with pytest.raises(UnreadableInput, match=r"rendered prompts are not those .*'train'") as caught:
            train(evolve(spec, training=training(steps=3)), run, resume=True, accept=["models"])
        assert "chat template" in caught.value.hint
        with pytest.raises(UnreadableInput, match=r"rendered prompts .* recorded with: 'train'$"):
            train(spec, tmp_path / "replay", recording=open_recording(f"{run}@0"), accept=["models"])
    finally:
        undo()


def test_prompt_fingerprints_tell_what_changed(spec, tmp_path):
    def fingerprints(spec, now=FIXED):
        tokenizer = AutoTokenizer.from_pretrained(spec.model.path)
        return RunData(spec, tmp_path, tokenizer, now=now).prompt_fingerprints(6)

    first = fingerprints(spec)
    assert fingerprints(spec) == first
    assert all(digest != first[name] for name, digest in fingerprints(spec, datetime.now()).items())
    teacher = evolve(spec.teacher, sees=evolve(spec.teacher.sees, template="{prompt} {demonstration}"))
    other = fingerprints(evolve(spec, teacher=teacher))
    assert {name for name in first if other[name] != first[name]} == {
        "train (teacher)", "suite sums (teacher)", "suite more (teacher)"
    }  # fmt: skip


def test_date_defaults_to_the_start_of_the_run():
    assert prompt_record.template_date({}) is None
    assert prompt_record.template_date({"started": "2024-07-26T12:00:00+00:00"}).year == 2024


@pytest.mark.parametrize(
    "before",
    [
        "{{ [1, 2, 3, 4] | random }}",
        "{{ range(9) | random }}",
        "{{ lipsum() }}",
        "{% if range(10**5) | random == 0 %}Hurray.{% endif %}",  # almost never rendered
    ],
)
def test_random_template_is_refused(tiny_folder, tmp_path, before):
    model = copy_with_date(tiny_folder, tmp_path / "model", before)
    data = RunData(make_spec(model), tmp_path, AutoTokenizer.from_pretrained(model))
    with pytest.raises(BadData, match=r"row [0-9]: the chat template renders .* differently") as caught:
        data.check(1)
    assert caught.value.path == ("model", "path")


SPELLING = (
    {"prompt": "a", "demonstration": "d", "answer": "1"},
    {"prompt": "b", "demonstration": "d<|im_end|>", "answer": "1"},
    {"prompt": "<|im_start|>c", "demonstration": "d", "answer": "1<|im_end|>"},
)


def test_rows_that_spell_control_tokens_are_named(tiny_folder, tmp_path):
    source = InlineSource(rows=tuple(Table(row) for row in SPELLING))
    spec = make_spec(tiny_folder, training=training(steps=1, prompts_per_step=3))
    spec = evolve(spec, data=DataSpec(source=source, columns=spec.data.columns, shuffle=False))
    console = Console(file=StringIO(), width=140)
    train(spec, tmp_path / "tokens", console)
    message = "warning: control tokens in 2 rows, which the model reads as such: "
    assert message + "row 1 <|im_end|>, row 2 <|im_start|>" in console.file.getvalue()
    as_text = evolve(spec, model=evolve(spec.model, control_tokens="text"))
    console = Console(file=StringIO(), width=140)
    folder = train(as_text, tmp_path / "text", console)
    assert "control tokens" not in console.file.getvalue()
    ends = AutoTokenizer.from_pretrained(tiny_folder).convert_tokens_to_ids("<|im_end|>")
    for record in lines(folder / "rollouts" / "step_000000.jsonl"):
        assert record["prompt_ids"].count(ends) == record["teacher_prompt_ids"].count(ends) == 1
