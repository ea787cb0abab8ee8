"""Training on logged chats: every turn of the assistant, and nothing else."""

from io import StringIO

import pytest
import torch
from attrs import evolve
from rich.console import Console
from tinyruns import lines, make_spec, metrics, rollout, train, training, weights_of

from sdkit.data.rows import load_rows
from sdkit.language.specs import (
    ChatTurns,
    CrossEntropy,
    DatasetSamples,
    DataSpec,
    InlineSource,
    LastTurn,
    PerTurn,
    Table,
)
from sdkit.train.data_report import oddities
from sdkit.train.inputs import checked_data
from sdkit.train.preview import preview
from sdkit.train.smoke import stand_in_rows

ASKED, TOLD = {"role": "user", "content": "Guess."}, {"role": "user", "content": "Higher."}
FIVE, SEVEN = ({"role": "assistant", "content": text} for text in ("five", "it is seven"))


def spec_of(folder, *chats, column=None, **changes):
    rows = tuple(Table({"chat": (*chat,)}) for chat in chats)
    columns = Table({"prompt": "chat", "demonstration": column or ChatTurns(turns="chat")})
    parts = {
        "data": DataSpec(source=InlineSource(rows=rows), columns=columns),
        "teacher": None,
        "rollout": rollout(sampled_by=DatasetSamples(), max_new_tokens=64),
        "losses": Table({"imitate": CrossEntropy()}),
        "training": training(steps=1, prompts_per_step=len(chats)),
    }
    return make_spec(folder, **(parts | changes))


def test_only_the_turns_of_the_assistant_are_trained(tiny_folder, tiny_tokenizer, tmp_path):
    run = train(spec_of(tiny_folder, (ASKED, FIVE, TOLD, SEVEN)), tmp_path / "run")
    (record,) = lines(run / "rollouts/step_000000.jsonl")
    texts = [tiny_tokenizer.decode(record["completion_ids"][s["start"] : s["end"]]) for s in record["spans"]]
    assert texts[::2] == ["five<|im_end|>", "it is seven<|im_end|>"]
    assert [s["role"] for s in record["spans"]] == ["assistant", "user", "assistant"]
    assert record["ending"] == "done"
    line = metrics(run)[0]
    assert line["rollout/tokens"] == sum(len(tiny_tokenizer(text)["input_ids"]) for text in texts[::2])
    assert line["trajectory/turns"] == 2
    # Cross-entropy is a mean over trained tokens, so it is that of the turns one by one, each behind what came before it.
    assert line["loss"] == pytest.approx(_cross_entropy(tiny_folder, record), rel=1e-4)


def _cross_entropy(folder, record):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompt, completion = record["prompt_ids"], record["completion_ids"]
    logprobs = model(torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
    sampled = [p for s in record["spans"] if s["role"] == "assistant" for p in range(s["start"], s["end"])]
    return -sum(logprobs[len(prompt) + p - 1, completion[p]].item() for p in sampled) / len(sampled)


def test_chats_of_one_turn_train_as_their_last_turns(tiny_folder, tmp_path):
    spec = spec_of(tiny_folder, (ASKED, FIVE), (TOLD, SEVEN))
    columns = Table({"prompt": "chat", "demonstration": LastTurn(last_turn="chat")})
    last = evolve(spec, data=evolve(spec.data, columns=columns))
    runs = [train(each, tmp_path / name) for each, name in ((spec, "turns"), (last, "last"))]
    of_turns, of_last = map(weights_of, runs)
    assert all(torch.equal(of_turns[name], of_last[name]) for name in of_last)


@pytest.mark.parametrize("drawn_by", ["other", "student"])
def test_logged_chats_distil(tiny_folder, tmp_path, drawn_by):
    from tinyruns import distil, teacher

    from sdkit.language.specs import FrozenWeights, TextSlot, UserTurn

    sees = UserTurn(template="{prompt} {hint}", slots=Table({"hint": TextSlot(text="It is seven.")}))
    spec = spec_of(
        tiny_folder,
        (ASKED, FIVE, TOLD, SEVEN),
        (TOLD, SEVEN),
        teacher=teacher(FrozenWeights(), sees),
        losses=distil(average=PerTurn()),
        rollout=rollout(sampled_by=DatasetSamples(drawn_by=drawn_by), max_new_tokens=64),
    )
    run = train(spec, tmp_path / "run")
    assert metrics(run)[0]["grad_norm"] > 0
    assert metrics(run)[0]["trajectory/turns"] == 1.5
    for record in lines(run / "rollouts/step_000000.jsonl"):
        for span in record["spans"]:
            counted = {v is not None for v in record["token_divergence"][span["start"] : span["end"]]}
            assert counted == {span["role"] == "assistant"}


def test_smoke_rows_of_logged_chats_can_be_read(tiny_folder):
    spec = spec_of(tiny_folder, (ASKED, FIVE))
    columns = Table({**spec.data.columns, "tools": "tools"})
    rows = load_rows(stand_in_rows(spec, columns), tiny_folder)
    assert {row.tools for row in rows} == {()}


def test_data_report_shows_spans_and_what_is_odd(tiny_folder, tmp_path):
    spec = spec_of(tiny_folder, (ASKED, FIVE, TOLD), (ASKED, FIVE, TOLD, SEVEN))
    data, _ = checked_data(spec, tmp_path, str(tiny_folder))
    assert "'demonstration' goes on after the assistant's last turn, which is left out, in 1 row: 0" in oddities(data)
    screen = Console(file=StringIO(), width=200, force_terminal=True, color_system="standard")
    preview(spec, tmp_path, 2, screen)
    output = screen.file.getvalue()
    assert "2 turns trained" in output
    assert "\x1b[36mHigher.<|im_end|>" in output
    assert "\x1b[36mit is seven" not in output
