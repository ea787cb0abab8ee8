"""tools/bench: every shape is a valid spec, and its tables say what was measured."""

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve

import sdkit
from sdkit.language.specs import ShapeSpec

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools.bench import inputs, page, scaling, sdkit_side
from tools.bench.__main__ import SETS, choose, schedule
from tools.bench.measure import ChildFailed, Measurement, Session, run_process
from tools.bench.operations import Operations, count_operations
from tools.bench.shapes import MAIN, SCALING, Shape

ALL = choose(["main", "further", "scaling"], None)
MACHINE = {"device": "CPU", "bfloat16": 1e12, "float32": 1e11, "bytes": 1e10}


def measurement(shape, side, number=0, seconds=10.0, sampling=6.0):
    """Three steps of 100 tokens; the first takes twice as long."""
    later = {"seconds": seconds, "sampling": sampling, "teacher": 1.0, "update": 3.0, "tokens": 100}
    steps = [later | {"seconds": 2 * seconds}, later, later]
    return Measurement(shape=shape, side=side, round=number, steps=steps, peak_gib=1.5)


def session(names, done=(), dtype=None):
    return Session(
        folder=Path("session"), cache=Path("cache"), shapes=choose(names, dtype), machines=[MACHINE], done=done
    )


@pytest.mark.parametrize("shape", ALL.values(), ids=ALL)
def test_every_shape_is_a_valid_spec(shape, tiny_folder, tmp_path):
    for side in set(shape.sides) - {"TRL"}:
        inputs.write_rows(shape, tmp_path / "rows.jsonl")
        sdkit_side.write_spec(shape, side, tiny_folder, tmp_path / "rows.jsonl", tmp_path / "spec.yaml")
        spec = sdkit.load_spec(tmp_path / "spec.yaml")
        assert isinstance(spec, sdkit.ExperimentSpec)
        assert (spec.training.prompts_per_step, spec.rollout.completions_per_prompt) == (shape.prompts, shape.group)
        assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == shape.prompts * shape.steps


def test_names_are_unique_and_sets_can_be_combined():
    assert len(ALL) == sum(map(len, SETS.values()))
    assert list(choose(["wide", "main"], None)) == ["wide", "sdft", "sdpo"]
    assert {shape.dtype for shape in choose(["main"], "float32").values()} == {"float32"}


def test_sides_alternate_and_only_main_shapes_have_every_round():
    planned = list(schedule(list(choose(["sdft", "lora"], None).values()), 3))
    assert [side for number, shape, side in planned if (number, shape.name) == (1, "sdft")] == [*MAIN[0].sides][::-1]
    assert Counter(shape.name for _, shape, _ in planned) == {"sdft": 9, "lora": 2}


def test_the_operations_of_a_step():
    """A layer of 10 parameters and width 4, a head of 4 × 5; 2 prompts of 3 tokens with 2 completions each of 1 token."""
    model = ShapeSpec(
        parameters=30, hidden_size=4, num_hidden_layers=1, vocab_size=5, max_position_embeddings=9, kv_width=4
    )
    shape = Shape(name="", about="", prompts=2, group=2, max_new_tokens=1)
    prompts, completions, logits = 6 * (20 + 8 * 3), 4 * (20 + 8 * 7), 40  # 8: attention per token and token of length
    teacher, student = 32 * (20 + 8 * 8) + 4 * logits, prompts + completions + 4 * logits
    needed = count_operations(shape, model, prompt=3, teacher_prompt=7)
    assert needed.sampling == prompts + 2 * logits + completions + 4 * logits
    assert needed.training == teacher + 3 * student
    assert count_operations(evolve(shape, lora=True), model, 3, 7).training == teacher + 2 * student


def test_a_row_has_medians_and_the_range_of_the_ratio_within_rounds(monkeypatch):
    monkeypatch.setattr(page, "operations", lambda *_: Operations(sampling=2e11, training=8e11))
    trl = [measurement("wide", "TRL", n, seconds) for n, seconds in enumerate((20.0, 30.0, 40.0))]
    own = [measurement("wide", "sdkit", n, 10.0) for n in range(3)]
    rows = page.speed_table(session(["wide"], [*trl, *own]), ["wide"]).splitlines()[2:]
    assert [cell.strip() for cell in rows[0].split("|")[3:-1]] == ["TRL", "3", "", "17", "4", "1.5", "3%", "2.0 ×"]
    ratio = "**3.00** (2.00 to 4.00)"
    assert [c.strip() for c in rows[1].split("|")[3:-1]] == ["sdkit", "10", ratio, "17", "25", "1.5", "10%", "2.0 ×"]


def test_a_side_that_failed_is_a_row_that_says_so(monkeypatch):
    monkeypatch.setattr(page, "operations", lambda *_: Operations(sampling=1.0, training=1.0))
    failed = Measurement(shape="wide", side="TRL", round=0, error="out of memory")
    rows = page.speed_table(session(["wide"], [failed, measurement("wide", "sdkit")]), ["wide"]).splitlines()[2:]
    assert "| TRL | failed: out of memory |" in rows[0]
    assert len({row.count("|") for row in rows}) == 1
    assert "| sdkit | 10 |  |" in rows[1]


def test_a_process_that_fails_gives_its_last_line(tmp_path):
    with pytest.raises(ChildFailed, match="no such shape"):
        run_process([sys.executable, "-c", "raise SystemExit('no such shape')"], tmp_path / "log", threads=1)
    assert run_process([sys.executable, "-c", "import time; time.sleep(0.6)"], tmp_path / "log", threads=1) > 0


def test_the_fit_finds_the_utilizations_that_the_points_were_made_with(monkeypatch, tmp_path):
    """Phases take 1 s at full use: teacher and update at a fifth, sampling at a quarter."""
    points = [point.name for points in SCALING.values() for point in points]
    made = {"seconds": 15.0, "sampling": 4.0, "teacher": 5.0, "update": 5.0, "tokens": 100.0}
    done = [Measurement(shape=name, side="sdkit, vLLM", round=0, steps=[made, made]) for name in points]

    class Made(scaling.Point):
        def predict(self, device):
            return [1 / device.bandwidth_utilization, *[1 / device.compute_utilization] * 2]

    def made_point(session, measured):
        unused: Any = None
        return Made(shape=session.shapes[measured.shape], measured=measured, spec=unused, model=unused)

    monkeypatch.setattr(scaling, "read_point", made_point)
    failed = Measurement(shape="ranks 2", side="sdkit, vLLM", round=1, error="one core")
    text = scaling.section(session(points, [*done, failed]), tmp_path / "assets/scaling.png")
    assert "40% and 60% by default" in text
    assert "fitted to these points they are 20% and 25%" in " ".join(text.split())
    assert "| vocabulary 49152 | 4.00 + 5.00 + 5.00 | 1.67 + 2.50 + 2.50 | 4.00 + 5.00 + 5.00 |" in text
    assert "| ranks 2 | failed: one core | | |" in text
    assert (tmp_path / "assets/scaling.png").stat().st_size > 10_000
