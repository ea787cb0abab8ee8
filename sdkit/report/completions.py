"""The completions that a report shows: held-out ones through training, and rollouts of the steps, within a size.

Texts that occur several times are stored once, in `Texts`, and named by their number.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from attrs import field, frozen

from sdkit.language.errors import UnreadableInput, counted
from sdkit.report.prompts import PromptKey, teacher_prompts
from sdkit.report.records import RunRecord
from sdkit.report.sampling import spread
from sdkit.train.show_rollouts import parts_of, token_pieces

HELD_OUT_BYTES, ROLLOUT_BYTES = 7_000_000, 10_000_000
"""Most bytes of all runs' held-out completions, and of their rollouts: a page stays below 30 MB."""
MAX_EVALUATIONS = 24
"""Evaluations of a run."""
SAMPLES_OF_PROMPT = 2
"""Completions of a held-out prompt at one evaluation."""
MAX_ROLLOUTS, ROLLOUTS_OF_STEP = 2_000, 16
"""Rollouts of a run, and of one of its steps."""
MAX_TOKENS = 2_000
"""Tokens of a rollout; of a longer one the middle is left out."""
MAX_CHARACTERS, MAX_FEEDBACK = 12_000, 2_000
"""Characters of a text, and of a reward's feedback."""
PROMPTS = ("prompt", "teacher_prompt")
"""The prompts of a rollout: the student's, and the teacher's if it has one."""
Decode = Callable[[tuple[int, ...]], str]
"""Token ids to text."""


@frozen
class Texts:
    """Texts by number."""

    texts: list[str] = field(factory=list)
    _numbers: dict[str, int] = field(factory=dict)

    def add(self, text: str) -> int:
        """The text's number.  Of a text longer than `MAX_CHARACTERS`, the middle is left out."""
        if len(text) > MAX_CHARACTERS:
            half = MAX_CHARACTERS // 2
            text = f"{text[:half]}\n[… {len(text) - 2 * half:,} characters left out …]\n{text[-half:]}"
        number = self._numbers.setdefault(text, len(self.texts))
        if number == len(self.texts):
            self.texts.append(text)
        return number


def held_out(record: RunRecord, tokenizer: Any, texts: Texts, size: int) -> list[dict[str, Any]]:
    """For each suite and decoding, the same prompts at every evaluation: texts, scores, feedback; at most `size` bytes."""
    points = spread(record.run.points, MAX_EVALUATIONS)
    groups: dict[tuple[str, str], list[dict[PromptKey, list[Mapping[str, Any]]]]] = {}
    for place, point in enumerate(points):
        for entry in record.run.records(point):
            steps = groups.setdefault((entry["suite"], entry["decoding"]), [{} for _ in points])
            steps[place].setdefault((entry["row"], entry["prompt"]), []).append(entry)
    main = dict(record.run.main_score(suite) for suite, _ in groups)
    teachers = teacher_prompts(record, tokenizer)
    return [
        {
            "suite": suite,
            "decoding": decoding,
            "main": main[suite],
            "steps": [point.step for point in points],
            "all_evaluations": len(record.run.points),
            **_prompts(steps, texts, size // len(groups), main[suite], teachers.get(suite, {})),
        }
        for (suite, decoding), steps in groups.items()
    ]


def _prompts(
    steps: Sequence[Mapping[PromptKey, Sequence[Mapping[str, Any]]]],
    texts: Texts,
    size: int,
    main: str,
    teachers: Mapping[PromptKey, str],
) -> dict[str, Any]:
    keys = list(dict.fromkeys(key for step in steps for key in step))
    shown = [e for step in steps for entries in step.values() for e in entries[:SAMPLES_OF_PROMPT]]
    total = sum(min(len(text), MAX_CHARACTERS) for key in keys for text in (key[1], teachers.get(key, "")))
    total += sum(
        min(len(text), MAX_CHARACTERS) + 150
        for e in shown
        for text in (e["completion"], *_feedback(e).values(), *(part["text"] for part in e.get("turns", ())))
    )
    fitting = max(1, min(len(keys), len(keys) * size // max(total, 1)))
    prompts = [
        {
            "row": row,
            "prompt": texts.add(prompt),
            "teacher_prompt": texts.add(teachers[row, prompt]) if (row, prompt) in teachers else None,
            "means": [_mean(step.get((row, prompt), ()), main) for step in steps],
            "samples": [
                [
                    {
                        "text": texts.add(e["completion"]),
                        "scores": e["scores"],
                        "feedback": _feedback(e),
                        "ending": e.get("ending"),
                        "turns": [{**part, "text": texts.add(part["text"])} for part in e.get("turns", ())],
                    }
                    for e in step.get((row, prompt), ())[:SAMPLES_OF_PROMPT]
                ]
                for step in steps
            ],
        }
        for row, prompt in spread(keys, fitting)
    ]
    samples = max((len(entries) for step in steps for entries in step.values()), default=0)
    return {"prompts": prompts, "all_prompts": len(keys), "all_samples": samples}


def _feedback(entry: Mapping[str, Any]) -> dict[str, str]:
    return {name: str(text)[:MAX_FEEDBACK] for name, text in (entry.get("feedback") or {}).items()}


def _mean(entries: Sequence[Mapping[str, Any]], reward: str) -> float | None:
    values = [entry["scores"][reward] for entry in entries if reward in entry["scores"]]
    return sum(values) / len(values) if values else None


def rollouts(record: RunRecord, tokenizer: Any, texts: Texts, size: int) -> dict[str, Any]:
    """Rollouts of the steps as text, token by token; at most about `size` bytes.  `problem` says why there are none."""
    files = sorted((record.run.path / "rollouts").glob("step_*.jsonl"))
    if not files:
        return {"steps": [], "problem": "this run has recorded no rollouts"}
    if tokenizer is None:
        return {
            "steps": [],
            "problem": "the tokenizer of this run's model cannot be loaded, so its rollouts are not shown",
        }
    decode = lru_cache(maxsize=100_000)(lambda ids: tokenizer.decode(list(ids)))
    of_step = max(2, min(ROLLOUTS_OF_STEP, MAX_ROLLOUTS // len(files)))
    steps = [_step(path, of_step, decode) for path in spread(files, MAX_ROLLOUTS // of_step)]
    _reduce(steps, size)
    for rollout in (rollout for step in steps for rollout in step["rollouts"]):
        rollout |= {n: None if rollout[n] is None else texts.add(rollout[n]) for n in PROMPTS}
    return {"steps": steps, "all_steps": len(files), "problem": None}


def _reduce(steps: list[dict[str, Any]], size: int) -> None:
    """Leave out rollouts of every step, then steps, until all fit into `size` bytes."""
    while _size(steps) > size:
        most = max(len(step["rollouts"]) for step in steps)
        if most > 1:
            for step in steps:
                step["rollouts"] = spread(step["rollouts"], -(-most // 2))
        elif len(steps) > 1:
            steps[:] = spread(steps, -(-len(steps) // 2))
        else:
            return


def _size(steps: Sequence[Mapping[str, Any]]) -> int:
    """About how many bytes the rollouts take in a page, where each text is stored once."""
    all_rollouts = [rollout for step in steps for rollout in step["rollouts"]]
    prompts = {rollout[name] for rollout in all_rollouts for name in PROMPTS if rollout[name]}
    own = (len(json.dumps({**rollout, **dict.fromkeys(PROMPTS, 0)})) for rollout in all_rollouts)
    return sum(own) + sum(min(len(prompt), MAX_CHARACTERS) for prompt in prompts)


def _step(path: Path, count: int, decode: Decode) -> dict[str, Any]:
    try:
        with path.open(encoding="utf-8") as file:
            lines = [line for line in file if line.endswith("\n")]  # a killed run may leave half a line
        chosen = [_rollout(json.loads(line), decode) for line in spread(lines, count)]
    except (ValueError, KeyError, TypeError) as error:
        raise UnreadableInput(f"{path}: not the rollouts of a step: {error!r}") from None
    return {"step": int(path.stem.removeprefix("step_")) + 1, "all_rollouts": len(lines), "rollouts": chosen}


def _rollout(entry: Mapping[str, Any], decode: Decode) -> dict[str, Any]:
    ids, values = entry["completion_ids"], entry.get("token_divergence")
    pairs = list(zip(ids, values or [None] * len(ids), strict=True))
    spans = parts_of(entry) if "spans" in entry else [{"start": 0, "end": len(pairs)}]
    parts = [list(_pieces(pairs, decode, span["start"], span["end"])) for span in spans]
    pieces = [piece for part in parts for piece in part]
    prompts = {name: entry.get(f"{name}_ids") for name in PROMPTS}
    return {
        "row": entry["row"],
        "group": entry["group"],
        "finished": entry["finished"],
        "tokens": len(ids),
        "scores": entry.get("scores") or {},
        **{name: decode(tuple(ids_of_prompt)) if ids_of_prompt else None for name, ids_of_prompt in prompts.items()},
        "pieces": [text for text, _ in pieces],
        "divergence": [value for _, value in pieces] if values else None,
        "ending": entry.get("ending"),
        "turns": [
            {"turn": span["turn"], "role": span["role"], "reward": span["reward"], "pieces": len(part)}
            for span, part in zip(spans, parts, strict=True)
            if "turn" in span
        ],
    }


def _pieces(
    pairs: Sequence[tuple[int, float | None]], decode: Decode, start: int, end: int
) -> Iterator[tuple[str, float | None]]:
    """The text and divergence of the tokens `start` to `end` of a rollout; of more than `MAX_TOKENS`, its middle is left out."""

    def read(ids: list[int]) -> str:
        return decode(tuple(ids))

    half = MAX_TOKENS // 2
    first, last = (half, len(pairs) - half) if len(pairs) > MAX_TOKENS else (len(pairs), len(pairs))
    yield from token_pieces(read, pairs[start : min(end, first)])
    if start <= first < min(end, last):
        yield f" [… {counted(last - first, 'token')} left out …] ", None
    yield from token_pieces(read, pairs[max(start, last) : end])
