"""The prompts of student and teacher, and that one completion follows both."""

import copy

import pytest

from sdkit.data.prompts import Prompter, check_generation_prompt, check_prompts
from sdkit.data.rows import load_rows
from sdkit.data.teacher_context import slot_values, teacher_messages
from sdkit.data.turn_ends import end_token
from sdkit.language.errors import BadData
from sdkit.language.specs import (
    ColumnSlot,
    DataSpec,
    EarlierTurns,
    JsonLinesSource,
    SystemMessage,
    Table,
    TextSlot,
    Turn,
    UserTurn,
)

INVITE = "<|im_start|>assistant\n"
SYSTEM = {"role": "system", "content": "S"}
EXCHANGE = ({"role": "user", "content": "u0"}, {"role": "assistant", "content": "a0"})


def column(name="demonstration"):
    return ColumnSlot(name=name)


def user_turn(template="{prompt}\nExample: {demo}", **more):
    more.setdefault("slots", Table({"demo": column()}))
    return UserTurn(template=template, **more)


@pytest.fixture
def prompter(tiny_tokenizer):
    return Prompter(tiny_tokenizer, {})


def teacher_view(row, sees):
    return [(m["role"], m["content"]) for m in teacher_messages(row, sees, slot_values(row, sees))]


def test_user_turn_replaces_the_last_user_message_only(make_row):
    row = make_row("Q", before=(SYSTEM, *EXCHANGE), demonstration="D")
    assert teacher_view(row, user_turn()) == [
        ("system", "S"),
        ("user", "u0"),
        ("assistant", "a0"),
        ("user", "Q\nExample: D"),
    ]


def test_system_message_is_created_or_extended(make_row):
    sees = SystemMessage(template="See {demo}.", slots=Table({"demo": column()}))
    assert teacher_view(make_row("Q", demonstration="D"), sees) == [("system", "See D."), ("user", "Q")]
    row = make_row("Q", before=(SYSTEM,), demonstration="D")
    assert teacher_view(row, sees) == [("system", "S\n\nSee D."), ("user", "Q")]


def test_earlier_turns_come_between_system_message_and_prompt(make_row):
    turns = (Turn(user="Solve: {prompt}", assistant="{demo}"), Turn(user="Sure?", assistant="Yes."))
    sees = EarlierTurns(turns=turns, slots=Table({"demo": column()}))
    row = make_row("Q", before=(SYSTEM, *EXCHANGE), demonstration="D")
    assert teacher_view(row, sees) == [
        ("system", "S"),
        ("user", "Solve: Q"),
        ("assistant", "D"),
        ("user", "Sure?"),
        ("assistant", "Yes."),
        ("user", "u0"),
        ("assistant", "a0"),
        ("user", "Q"),
    ]


def test_teacher_without_context_sees_the_students_prompt(prompter, make_row):
    row = make_row()
    assert prompter.teacher_ids(row, None).ids == prompter.student_ids(row)


def test_texts_with_braces_are_never_interpreted(prompter, make_row, tiny_tokenizer):
    row = make_row("{demo} {{x}} {0}", demonstration="{prompt} {nothing} }{")
    sees = user_turn("{{{prompt}}} / {demo}")
    assert teacher_view(row, sees) == [("user", "{{demo} {{x}} {0}} / {prompt} {nothing} }{")]
    assert "{demo} {{x}} {0}" in tiny_tokenizer.decode(prompter.student_ids(row))


def test_template_with_an_unknown_name_is_refused(make_row):
    with pytest.raises(BadData, match=r"\{demos\}, which is not a slot") as caught:
        teacher_view(make_row(demonstration="D"), user_turn("{prompt} {demos}"))
    assert caught.value.hint == "did you mean {demo}?"


TWO = Table({"a": column("a"), "b": column("b"), "fixed": TextSlot(text="F")})


@pytest.mark.parametrize(
    ("requires", "columns", "content"),
    [
        ("all", {"a": "1", "b": "2"}, "12F"),
        ("all", {"a": "1", "b": ""}, None),
        ("all", {"a": "1", "b": None}, None),
        ("all", {"a": "1"}, None),
        ("any", {"a": "1"}, "1F"),
        ("any", {"b": "2", "a": None}, "2F"),
        ("any", {"a": "", "b": None}, None),
        ("any", {"a": 0}, "0F"),
    ],
)
def test_requires_decides_which_rows_have_a_context(prompter, make_row, requires, columns, content):
    row, sees = make_row(**columns), user_turn("{a}{b}{fixed}", slots=TWO, requires=requires)
    assert (prompter.teacher_ids(row, sees) is None) == (content is None)
    assert content is None or teacher_view(row, sees) == [("user", content)]


@pytest.mark.parametrize("requires", ["all", "any"])
def test_fixed_texts_are_never_missing(prompter, make_row, requires):
    sees = user_turn("{prompt} {hint}", slots=Table({"hint": TextSlot(text="H")}), requires=requires)
    assert prompter.teacher_ids(make_row(), sees) is not None


def test_one_completion_follows_both_prompts(prompter, make_row, tiny_tokenizer):
    row = make_row(demonstration="2 + 2 = 4")
    completion = tuple(tiny_tokenizer("The answer is 4<|im_end|>")["input_ids"])
    student, teacher = prompter.student_ids(row), prompter.teacher_ids(row, user_turn()).ids
    for prompt in (student, teacher):
        spliced = prompt + completion
        assert spliced[len(prompt) :] == completion
        assert tiny_tokenizer.decode(spliced).endswith(INVITE + "The answer is 4<|im_end|>")
        # The same ids as tokenizing the complete chat.
        assert tuple(tiny_tokenizer(tiny_tokenizer.decode(spliced))["input_ids"]) == spliced


def test_generation_prompt(prompter, make_row, tiny_tokenizer):
    row = make_row()
    assert tiny_tokenizer.decode(prompter.generation_prompt(row, row.messages)) == INVITE


def test_both_prompts_end_with_the_generation_prompt(prompter, make_row):
    row = make_row("Q", demonstration="D")
    decode = prompter.tokenizer.decode
    teacher = prompter.teacher_ids(row, user_turn())
    assert decode(prompter.student_ids(row)) == f"<|im_start|>user\nQ<|im_end|>\n{INVITE}"
    assert decode(teacher.ids) == f"<|im_start|>user\nQ\nExample: D<|im_end|>\n{INVITE}"
    assert (decode(prompter.generation_prompt(row, row.messages)), teacher.cut_tokens) == (INVITE, 0)
    assert prompter.teacher_ids(make_row("Q"), user_turn()) is None


def test_context_that_switches_the_thinking_mode_is_refused(switching_tokenizer, make_row):
    prompter = Prompter(switching_tokenizer, {})
    row = make_row(before=(SYSTEM,), demonstration="D")
    check_generation_prompt(prompter, row, prompter.teacher_ids(row, user_turn()))
    sees = SystemMessage(template="/think", slots=Table({"demo": column()}))
    with pytest.raises(BadData, match=r"row 0: before the completion .*<think></think>"):
        check_generation_prompt(prompter, row, prompter.teacher_ids(row, sees))


def test_contents_are_joined_without_a_chat_template(plain_tokenizer, make_row):
    prompter = Prompter(plain_tokenizer, {})
    row = make_row("Q", before=(SYSTEM,), demonstration="D")
    assert plain_tokenizer.decode(prompter.student_ids(row)) == "S\n\nQ"
    assert plain_tokenizer.decode(prompter.teacher_ids(row, user_turn()).ids) == "S\n\nQ\nExample: D"
    assert prompter.generation_prompt(row, row.messages) == ()


def test_chat_template_gets_its_options(tiny_tokenizer, plain_tokenizer, make_row):
    tokenizer = type(tiny_tokenizer)(tokenizer_object=tiny_tokenizer.backend_tokenizer)
    tokenizer.chat_template = "{{ messages[0]['content'] }}{% if loud %}!{% endif %}"
    assert tokenizer.decode(Prompter(tokenizer, {"loud": True}).student_ids(make_row("Q"))) == "Q!"
    assert tokenizer.decode(Prompter(tokenizer, {"loud": False}).student_ids(make_row("Q"))) == "Q"
    with pytest.raises(BadData, match="never reads the option 'lout'"):
        Prompter(tokenizer, {"lout": True})
    with pytest.raises(BadData, match="no chat template to take the option 'loud'"):
        Prompter(plain_tokenizer, {"loud": True})


def test_refusal_of_a_chat_template_names_the_row(tiny_tokenizer, make_row):
    tokenizer = type(tiny_tokenizer)(tokenizer_object=tiny_tokenizer.backend_tokenizer)
    tokenizer.chat_template = "{{ raise_exception('no system messages') }}"
    with pytest.raises(BadData, match=r"row 5: .* roles 'system', 'user': no system messages"):
        Prompter(tokenizer, {}).student_ids(make_row(index=5, before=(SYSTEM,)))


LONG = "one two three four five six seven eight 漢字 nine ten é"


@pytest.mark.parametrize("cut", ["start", "end"])
@pytest.mark.parametrize("kind", ["user_turn", "system_message", "earlier_turns"])
def test_truncation_shortens_only_the_context(prompter, make_row, tiny_tokenizer, kind, cut):
    row = make_row("the prompt stays", before=(SYSTEM,), demonstration=LONG)

    def sees(limit):
        common = {"slots": Table({"demo": column()}), "max_prompt_tokens": limit, "cut": cut}
        if kind == "user_turn":
            return UserTurn(template="{prompt} [{demo}] stay", **common)
        if kind == "system_message":
            return SystemMessage(template="[{demo}] stay", **common)
        return EarlierTurns(turns=(Turn(user="[{demo}]", assistant="stay"),), **common)

    full = prompter.teacher_ids(row, sees(None))
    bare_prompt = prompter.teacher_ids(make_row(row.prompt_text, before=(SYSTEM,), demonstration="x"), sees(None))  # fmt: skip
    shortest, previous_length = len(bare_prompt.ids) - 1, -1
    for limit in range(shortest, len(full.ids) + 2):
        cut_prompt = prompter.teacher_ids(row, sees(limit))
        text = tiny_tokenizer.decode(cut_prompt.ids)
        assert len(cut_prompt.ids) <= limit
        assert cut_prompt.cut_tokens == len(full.ids) - len(cut_prompt.ids)
        assert text.endswith(INVITE)
        assert "the prompt stays" in text
        remaining = text.partition("[")[2].partition("]")[0]
        assert (LONG.startswith if cut == "end" else LONG.endswith)(remaining)
        assert len(remaining) >= previous_length
        previous_length = len(remaining)
    assert cut_prompt.ids == full.ids
    with pytest.raises(BadData, match=f"row 0: .* with every slot empty, more than {shortest - 1}"):
        prompter.teacher_ids(row, sees(shortest - 1))


def test_longest_slot_is_truncated_first(prompter, make_row):
    slots = Table({"a": column("a"), "b": column("b"), "fixed": TextSlot(text="fixed text stays")})
    row = make_row("Q", a="x y z", b="w " * 60)

    def sees(limit):
        return user_turn("A[{a}] B[{b}] {fixed} {prompt}", slots=slots, max_prompt_tokens=limit)

    full_length = len(prompter.teacher_ids(row, sees(None)).ids)
    content = prompter.teacher_ids(row, sees(full_length - 30)).messages[0]["content"]
    assert "A[x y z]" in content
    assert 0 < content.count("w") < 60
    assert content.endswith("] fixed text stays Q")
    empty = make_row("Q", a=" ", b=" ")
    shortest = len(prompter.teacher_ids(empty, sees(None)).ids)
    content = prompter.teacher_ids(row, sees(shortest)).messages[0]["content"]
    assert "x y z" not in content
    assert content.endswith("] fixed text stays Q")


def test_template_longer_than_the_limit_is_refused(prompter, make_row):
    turns = (Turn(user="w " * 50, assistant="{demo}"),)
    sees = EarlierTurns(turns=turns, slots=Table({"demo": column()}), max_prompt_tokens=20)
    with pytest.raises(BadData, match="row 3: the teacher's prompt has"):
        prompter.teacher_ids(make_row(index=3, demonstration="D"), sees)


def test_check_prompts_names_every_row(prompter, make_row, tiny_tokenizer):
    rows = [make_row("word " * n, index=n, demonstration="D") for n in (1, 30, 40)]
    check_prompts(prompter, rows, user_turn())
    with pytest.raises(BadData) as caught:
        check_prompts(prompter, rows, user_turn(max_prompt_tokens=30), max_prompt_tokens=30)
    named = [line.partition(":")[0] for line in caught.value.message.splitlines()]
    assert named == ["row 30", "row 30", "row 40", "row 40"]  # the student's prompt, the teacher's
    many = [make_row("word " * 30, index=i) for i in range(23)]
    with pytest.raises(BadData, match=r"… and 3 more$"):
        check_prompts(prompter, many, None, max_prompt_tokens=30)


@pytest.mark.parametrize("name", ["sciknoweval/physics-test.json", "tooluse/test.json"])
def test_real_prompts_end_with_the_generation_prompt(real_data, prompter, tiny_tokenizer, name):
    columns = Table({"prompt": "prompt", "system": "system", "demonstration": "answer"})
    data = DataSpec(source=JsonLinesSource(path=name), columns=columns, limit=20)
    rows = load_rows(data, real_data)
    sees = user_turn("\n{prompt}\n\nThis is an example:\n{demo}\n")
    for row, (student, teacher) in zip(rows, check_prompts(prompter, rows, sees), strict=True):
        for text in map(tiny_tokenizer.decode, (student, teacher.ids)):
            assert text.endswith(INVITE)
            assert row.prompt_text in text


@pytest.mark.parametrize("program", ["{{ 1 + messages }}", "{{ range(10**9) }}", "{{ 1 // 0 }}", "{% for %}"])
def test_any_error_of_a_chat_template_names_the_row(tiny_tokenizer, make_row, program):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = program
    with pytest.raises(BadData, match="row 4: the chat template refuses messages"):
        Prompter(tokenizer, {}).student_ids(make_row(index=4))
    assert end_token(tokenizer, {}) == tokenizer.eos_token_id
