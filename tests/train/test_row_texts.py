"""The parts of a row that a run uses as text: completions, slots, attempts without their thinking."""

import pytest
from attrs import evolve
from test_prompt_record import copy_with_date
from tinyruns import FrozenWeights, lines, make_spec, rollout, teacher, train, training
from transformers import AutoTokenizer

from sdkit.language.errors import BadData
from sdkit.language.specs import DatasetSamples, DataSpec, ExactReward, InlineSource, OwnAttempt, Table, UserTurn
from sdkit.train.inputs import RunData

COLUMNS = Table({"prompt": "prompt", "demonstration": "demonstration", "answer": "answer"})


def spec_of(folder, demonstration="d", answer="1", **changes):
    row = Table({"prompt": "q", "demonstration": demonstration, "answer": answer})
    data = DataSpec(source=InlineSource(rows=(row,)), columns=COLUMNS)
    by = DatasetSamples(column="demonstration")
    once = training(steps=1, prompts_per_step=1)
    parts = {"data": data, "rollout": rollout(sampled_by=by, max_new_tokens=64), "training": once}
    return make_spec(folder, **(parts | changes))


@pytest.mark.parametrize(
    ("values", "column"), [({"demonstration": ["a", "b"]}, "demonstration"), ({"answer": [1]}, "answer")]
)
def test_column_used_as_text_must_be_text(tiny_folder, tmp_path, values, column):
    spec = evolve(spec_of(tiny_folder, **values), rewards=Table({"right": ExactReward()}))
    with pytest.raises(BadData, match=f"row 0: '{column}' is a list, not text") as caught:
        RunData(spec, tmp_path, AutoTokenizer.from_pretrained(tiny_folder))
    assert caught.value.path == ("data",)


def test_attempt_is_shown_without_the_thinking_opened_by_the_prompt(tiny_folder, tmp_path):
    invite = "<|im_start|>assistant\n"
    model = copy_with_date(tiny_folder, tmp_path / "model", "")
    path = model / "chat_template.jinja"
    opened_template = path.read_text().replace(invite, invite + "<think>\n")
    assert opened_template != path.read_text()
    path.write_text(opened_template)
    sees = UserTurn(template="{prompt} [{own}]", slots=Table({"own": OwnAttempt()}))
    answer = [{"role": "assistant", "content": "PRIVATE </think> 4"}]
    spec = spec_of(model, answer, teacher=teacher(FrozenWeights(), sees))
    spec = evolve(spec, rewards=Table({"right": ExactReward()}))
    folder = train(spec, tmp_path / "run")
    sample = lines(next((folder / "samples").iterdir()))[0]
    assert "q [4]" in sample["teacher_prompt"]
    assert sample["completion"].startswith("PRIVATE </think> 4")
