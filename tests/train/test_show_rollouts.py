"""`sdkit rollouts`: which rollouts are shown, and the divergence that colours each token."""

import json
from io import StringIO

import pytest
from rich.console import Console
from tinyruns import lines, make_spec, train, training, with_evaluation

from sdkit.language.errors import UnreadableInput
from sdkit.train import show_rollouts
from sdkit.train.show_rollouts import LARGEST, SCALE, select, show, write_page


@pytest.fixture(scope="module")
def spec(tiny_folder):
    spec = make_spec(tiny_folder, training=training(steps=2))
    return with_evaluation(spec, teacher_lift=0, every=None)


@pytest.fixture(scope="module")
def run(spec, tmp_path_factory):
    return train(spec, tmp_path_factory.mktemp("shown") / "run")


def printed(spec, run, records, **options):
    console = Console(file=StringIO(), width=200, color_system="truecolor", force_terminal=True)
    show(spec, run, records, console, prompts=options.get("prompts", False))
    return console.file.getvalue()


def test_recorded_divergences_average_to_the_metric(run):
    for line in [line for line in lines(run / "metrics.jsonl") if "loss" in line]:
        records = lines(run / f"rollouts/step_{line['step'] - 1:06d}.jsonl")
        values = [value for record in records for value in record["token_divergence"] if value is not None]
        assert len(values) == line["distil/tokens"]
        assert sum(values) / len(values) == pytest.approx(line["distil/token_loss"], rel=1e-3)
        assert set(records[0]["scores"]) == {"right", "number"}


def test_steps_count_as_in_the_metrics(run):
    folder, newest = select(str(run), None, 100)
    assert (folder, newest) == (run, lines(run / "rollouts/step_000001.jsonl"))
    assert select(f"{run}@1", None, 2)[1] == lines(run / "rollouts/step_000000.jsonl")[:2]
    row = newest[1]["row"]
    assert [record["row"] for record in select(f"{run}@2", row, 100)[1]] == [row]


@pytest.mark.parametrize(
    ("name", "row", "message", "hint"),
    [
        ("@7", None, "has no rollouts of step 7", "there are steps 1 to 2"),
        ("@1", 99, "row 99 has no rollout", "the rows are"),
        ("/model", None, "is not a run directory", "RUN@STEP"),
    ],
)
def test_rollouts_that_do_not_exist_are_refused(run, name, row, message, hint):
    with pytest.raises(UnreadableInput, match=message) as caught:
        select(f"{run}{name}", row, 1)
    assert hint in caught.value.hint


def test_tokens_are_coloured_by_their_divergence(spec, run, tiny_tokenizer):
    record = json.loads(json.dumps(lines(run / "rollouts/step_000000.jsonl")[0]))
    record["completion_ids"] = tiny_tokenizer("one two three four")["input_ids"][:4]
    record["token_divergence"] = [0.01, 0.3, None, 9.0]
    styles = [span.style for span in show_rollouts._coloured(tiny_tokenizer, record).spans]
    assert styles == [SCALE[1][1], "dim", LARGEST]
    text = printed(spec, run, [record])
    assert f"row {record['row']}, group {record['group']}, 4 tokens" in text
    assert "divergence 3.1 nats a token" in text
    assert "divergence of teacher and student, nats:" in text


def test_prompts_are_shown_on_request(spec, run):
    records = lines(run / "rollouts/step_000000.jsonl")[:1]
    assert "Example:" not in printed(spec, run, records)
    assert "Example:" in printed(spec, run, records, prompts=True)


def test_bytes_of_one_character_are_one_piece():
    class Bytes:
        @staticmethod
        def decode(ids):
            return bytes(ids).decode(errors="replace")

    tokens = [(b, 0.1 * i) for i, b in enumerate("aé!".encode())]
    assert [*show_rollouts.token_pieces(Bytes.decode, tokens)] == [("a", 0.0), ("é", 0.2), ("!", pytest.approx(0.3))]


def test_page_has_the_colours(spec, run, tmp_path):
    records = lines(run / "rollouts/step_000000.jsonl")[:2]
    write_page(spec, run, records, tmp_path / "page.html", prompts=False)
    page = (tmp_path / "page.html").read_text()
    assert LARGEST.split()[-1] in page
    with pytest.raises(UnreadableInput, match="must end in"):
        write_page(spec, run, records, tmp_path / "page.txt", prompts=False)


def test_command_prints_plain_text_into_a_pipe(sdkit, run):
    code, out, err = sdkit("rollouts", f"{run}@1", "--first", 1)
    assert code == 0, err
    assert out.startswith("row ")
    assert "\x1b" not in out
