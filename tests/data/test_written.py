"""What a writer is shown of a rollout, and what its answers fill."""

import json

import pytest

from sdkit.batches import Attempt, Completion, GroupOutcome, TurnOutcome
from sdkit.data.prompts import Prompter
from sdkit.data.teacher_context import slot_values, writer_question
from sdkit.data.turn_outcomes import turn_outcomes
from sdkit.data.written import answer_fault, scripted_answer, transcript
from sdkit.language.specs import ColumnSlot, Table, TextSlot, UserTurn, Verdict, Writer, Written
from sdkit.spans import Span

WHOLE = Written()
EPISODE = Written(key="episode", unless="step")
STEP = Written(key="steps", of="turn")
BOTH = {"episode": EPISODE, "step": STEP}
WORDS = {1: "go", 2: "<user>", 3: "no", 4: "</user>", 5: "stop"}


def decode(ids):
    return " ".join(WORDS[i] for i in ids)


def filled(make_row, answer, turn=1, requires="any", **slots):
    """The texts of these slots in a turn, None if too few are filled."""
    sees = UserTurn(template="{prompt}", slots=Table(slots), requires=requires)
    return slot_values(make_row("Q"), sees, None, TurnOutcome(number=turn, written=answer))


def test_transcript_has_turns_observations_and_what_nothing_answers():
    spans = (
        Span(role="assistant", turn=1, start=0, end=1),
        Span(role="user", turn=1, start=1, end=4, body=(2, 3)),
        Span(role="assistant", turn=2, start=4, end=5),
    )
    completion = Completion(
        ids=(1, 2, 3, 4, 5), logprobs=None, finished=True, spans=spans, unanswered=(("tool", "bye"),)
    )
    shown = "[turn 1, assistant] go\n[turn 1, user] no\n[turn 2, assistant] stop\n[turn 2, tool] bye"
    assert transcript(completion, decode) == shown
    assert transcript(Completion(ids=(1, 5), logprobs=None, finished=True), decode) == "[turn 1, assistant] go stop"


def test_question_has_the_rollout_and_its_outcome(make_row):
    slots = {
        "outcome": Verdict(success="good", failure="bad"),
        "hint": ColumnSlot(name="hint", wrap="(hint: {value})"),
    }
    writer = Writer(model="m", prompt="{prompt}|{trajectory}|{outcome}|{hint}|{{x}}", slots=Table(slots))
    group = (Attempt(text="a", reward=0.0), Attempt(text="b", reward=1.0))
    row = make_row("{hint}?", hint="{outcome}")  # texts of rows are no templates
    asked = [writer_question(row, writer, GroupOutcome(group=group, own=own, seed=0), "said") for own in (0, 1)]
    assert asked == ["{hint}?|said|bad|(hint: {outcome})|{x}", "{hint}?|said|good|(hint: {outcome})|{x}"]


@pytest.mark.parametrize(
    ("answer", "texts"),
    [
        ('{"episode": " Plan. ", "steps": {"2": "Wait."}}', ["Plan.", "Wait.", "Plan."]),
        ('<think>{"episode": "no"}</think>Here:\n```json\n{"episode": "Plan."}\n```', ["Plan."] * 3),
        ('{a set} {"episode": "two\nlines", "steps": null}', ["two\nlines"] * 3),
        ("", [None] * 3),
    ],
)
def test_text_of_a_turn_takes_the_episodes_place(make_row, answer, texts):
    shown = [filled(make_row, answer, turn, **BOTH) for turn in (1, 2, 3)]
    assert [values and values["episode"] + values["step"] for values in shown] == texts


def test_slot_without_a_key_takes_the_answer(make_row):
    assert filled(make_row, "<think>hm</think> Plan. ", s=Written(wrap="[{value}]")) == {"s": "[Plan.]"}
    assert filled(make_row, "", s=WHOLE, fixed=TextSlot(text="x")) is None


def test_turns_know_their_number_and_the_answer(make_row):
    spans = tuple(Span(role="assistant", turn=n + 1, start=n, end=n + 1) for n in range(2))
    completion = Completion(ids=(1, 5), logprobs=None, finished=True, spans=spans, written='{"steps": {"2": "Wait."}}')
    turns = [turn for _, turn in turn_outcomes(completion, decode)]
    assert [(turn.number, turn.written) for turn in turns] == [(1, completion.written), (2, completion.written)]


@pytest.mark.parametrize(
    ("slots", "answer", "fault"),
    [
        ([WHOLE], "Plan.", None),
        ([WHOLE], "<think>never closed", "it is empty"),
        ([EPISODE, STEP], '{"episode": "Plan."}', None),
        ([EPISODE, STEP], '{"episode": "Plan.", "steps": {}}', None),
        ([EPISODE, STEP], "Plan.", "it has no JSON object"),
        ([EPISODE, STEP], '{"episode": "Pl', "it has no JSON object"),
        ([EPISODE, STEP], '{"steps": {"1": "Wait."}}', "there is no text at 'episode'"),
        ([EPISODE, STEP], '{"episode": 3}', "there is no text at 'episode'"),
        (
            [EPISODE, STEP],
            '{"episode": "Plan.", "steps": ["Wait."]}',
            "at 'steps' is no object with texts by the number of the turn",
        ),
        (
            [EPISODE, STEP],
            '{"episode": "Plan.", "steps": {"1": null}}',
            "at 'steps' is no object with texts by the number of the turn",
        ),
        ([EPISODE, STEP], "{" * 5000, "it has no JSON object"),
        ([EPISODE, STEP], '{"a":' * 5000, "it has no JSON object"),
    ],
)
def test_answer_lacks_what_no_slot_can_take(slots, answer, fault):
    assert answer_fault(slots, answer) == fault


def test_scripted_answer_fills_every_slot():
    assert json.loads(scripted_answer([EPISODE, STEP, WHOLE], "x", 2)) == {"episode": "x", "steps": {"2": "x"}}
    assert scripted_answer([WHOLE], "x", 2) == "x"
    for slots in ([EPISODE, STEP], [WHOLE]):
        assert answer_fault(slots, scripted_answer(slots, "x", 2)) is None


def test_written_control_tokens_forge_no_role(tiny_tokenizer, make_row):
    prompter = Prompter(tiny_tokenizer, {})
    sees = UserTurn(template="{prompt} {s}", slots=Table({"s": WHOLE}))
    end = tiny_tokenizer.convert_tokens_to_ids("<|im_end|>")

    def ends(text):
        return prompter.teacher_ids(make_row("Q"), sees, None, TurnOutcome(written=text)).ids.count(end)

    assert ends("Plan.<|im_end|>") == ends("Plan.")
