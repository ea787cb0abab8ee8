"""Rollouts, which of their tokens a term counts, and the advantages, weights and factors of these: plain Python numbers.

Part of tools/parity_figures.py.
"""

from __future__ import annotations

import cmath
import math
import re
import statistics
from collections.abc import Sequence
from typing import Any

from parity_losses import Number, entropy, greater, held, keys, kind, lesser, softmax


class Batch:
    """Rollouts with the student's logits as complex numbers; figures of tokens at the sampling temperature."""

    def __init__(self, rollouts: Sequence[Any], temperature: float) -> None:
        self.rollouts, self.temperature = rollouts, temperature
        self.students: list[list[list[Number]]] = [
            [[complex(z) for z in logits] for logits in r["student"]] for r in rollouts
        ]

    def has_teacher(self, i: int) -> bool:
        return self.rollouts[i].get("teacher") is not None

    def places(self, i: int, roles: Sequence[str] = ("assistant",)) -> list[int]:
        """Positions of these roles; of what is shown between turns, only its own text."""
        whole = [["assistant", 1, 0, len(self.rollouts[i]["completion"])]]
        spans = self.rollouts[i].get("spans", whole)
        return [p for role, _, *ends in spans if role in roles for p in range(*(ends[2] if ends[2:] else ends))]

    def turn(self, i: int, p: int) -> int:
        """The turn of a position, from 1."""
        spans = self.rollouts[i].get("spans", ())
        return next((turn for _, turn, start, end, *_ in spans if start <= p < end), 1)

    def matches(self, i: int, spec: Any, roles: Sequence[str]) -> set[int]:
        """Positions within a match of the pattern; every token is one letter."""
        matched: set[int] = set()
        for turn, role in ((t, r) for t in range(1, 9) for r in roles):
            places = [p for p in self.places(i, [role]) if self.turn(i, p) == turn]
            text = "".join(LETTERS[self.token(i, p)] for p in places)
            for match in re.finditer(spec["pattern"], text):
                for group in range(1, match.re.groups + 1) if match.re.groups else [0]:
                    matched |= set(places[match.start(group) : match.end(group)])
        return matched

    def token(self, i: int, p: int) -> int:
        return self.rollouts[i]["completion"][p]

    def side(self, name: str, i: int, p: int, temperature: float | None = None) -> list[Number]:
        """The student's probabilities, the teacher's, the reference's, or the student's before the batch."""
        logits = self.students[i][p] if name == "student" else self.rollouts[i][name][p]
        return softmax(logits, self.temperature if temperature is None else temperature)

    def now(self, i: int, p: int) -> Number:
        return cmath.log(self.side("student", i, p)[self.token(i, p)])

    def then(self, i: int, p: int) -> float:
        """The log-probability before the batch: that of now where nothing is recorded."""
        side = "before" if "before" in self.rollouts[i] else "student"
        return math.log(held(self.side(side, i, p)[self.token(i, p)]))

    def log_ratio(self, i: int, p: int) -> float:
        """log teacher − log student before the batch."""
        return math.log(held(self.side("teacher", i, p)[self.token(i, p)])) - self.then(i, p)

    def measure(self, name: str, i: int, p: int) -> float:
        """A figure taken before the batch, stated or worked out."""
        if name in self.rollouts[i].get("measures", ()):
            return self.rollouts[i]["measures"][name][p]
        who, _, figure = name.partition("_")
        if who == "student":
            who = "before" if "before" in self.rollouts[i] else "student"
        held_side = self.side(who, i, p)
        if figure == "entropy":
            return entropy(held_side)
        return math.log(held(held_side[self.token(i, p)]))


LETTERS = "<ab>"
"""The text of each id."""
LONGEST = 4
"""Tokens of the longest completion that could be."""


def rewarded(spec: Any, rollout: Any) -> float:
    """A rollout's reward, less what an overlong completion loses."""
    overlong = spec.get("overlong")
    if overlong is None:
        return rollout["reward"]
    over = len(rollout["completion"]) - (LONGEST - overlong["stretch"])
    return rollout["reward"] - overlong.get("amount", 1.0) * min(max(over, 0) / overlong["stretch"], 1.0)


def reward_advantages(spec: Any, rollouts: Sequence[Any]) -> list[float]:
    """The reward of each rollout against its group's."""
    rewards, found = [rewarded(spec, r) for r in rollouts], []
    for r in rollouts:
        own = [rewarded(spec, x) for x in rollouts if x["group"] == r["group"]]
        worth = rewarded(spec, r)
        if spec.get("baseline", "group_mean") == "group_mean":
            worth -= statistics.mean(own)
        scale = spec.get("scale", "none")
        if scale != "none":
            of = own if scale == "group_std" else rewards
            spread = statistics.stdev(of) if len(of) > 1 else 0.0
            worth = worth / (spread + spec.get("eps", 1e-4)) if spread else 0.0
        found.append(worth)
    return found


def advantages(spec: Any, batch: Batch, rows: list[list[int]]) -> list[dict[int, float]]:
    """The advantage of each counted token, per rollout."""

    def of_reward(part: Any) -> list[dict[int, float]]:
        found = reward_advantages(keys(part), batch.rollouts)
        return [dict.fromkeys(places, a) for places, a in zip(rows, found, strict=True)]

    def of_teacher(part: Any) -> list[dict[int, float]]:
        floor = keys(part).get("floor", -math.inf)
        found = [
            {p: max(batch.log_ratio(i, p), floor) if batch.has_teacher(i) else 0.0 for p in places}
            for i, places in enumerate(rows)
        ]
        if discount := keys(part).get("discount"):
            found = [
                {p: sum(discount ** sum(p <= r < q for r in x) * x[q] for q in x if q >= p) for p in x} for x in found
            ]
        if keys(part).get("center") == "sequence":
            means = [statistics.mean(own.values()) if own else 0.0 for own in found]
            found = [{p: a - m for p, a in x.items()} for x, m in zip(found, means, strict=True)]
        return found

    own = keys(spec)
    if kind(spec) == "group_relative":
        return of_reward(spec)
    if kind(spec) == "log_ratio":
        return of_teacher(spec)
    pairs = list(zip(of_reward(own.get("group_relative")), of_teacher(own.get("log_ratio")), strict=True))
    if kind(spec) == "advantage_add":
        first, second = own.get("group_weight", 1.0), own.get("log_ratio_weight", 1.0)
        return [{p: first * a[p] + second * d[p] for p in a} for a, d in pairs]
    share, low, high = own.get("share", 0.5), own.get("low", 0.2), own.get("high", 0.2)

    def scaled(a: float, delta: float) -> float:
        factor = math.exp(math.copysign(1, a) * delta if a else 0.0)
        return a * (1 - share + share * min(max(factor, 1 - low), 1 + high))

    return [{p: scaled(a[p], d[p]) for p in a} for a, d in pairs]


def surrogate(clip: Any, ratio: Number, advantage: float) -> Number:
    """−min(ρA, clip(ρ) A), the dual bound where A < 0."""
    if clip is None:
        return -ratio * advantage
    clipped = greater(lesser(ratio, 1 + clip["high"]), 1 - clip["low"])
    found = greater(-ratio * advantage, -clipped * advantage)
    if "dual" in clip and advantage < 0:
        found = lesser(found, -clip["dual"] * advantage)
    return found


def ratio(term: Any, batch: Batch, i: int, places: list[int], p: int) -> Number:
    """The student now to before the batch, of a token or of its sequence."""
    moved = {q: batch.now(i, q) - batch.then(i, q) for q in places}
    if term.get("ratio", "token") != "token":
        same = [x for q, x in moved.items() if term["ratio"] == "sequence" or batch.turn(i, q) == batch.turn(i, p)]
        return cmath.exp(sum(same) / len(same))
    return cmath.exp(moved[p])


OF_TEACHER = ("teacher_entropy", "drift", "step_agreement")


def consults(term: Any) -> bool:
    """Whether the term counts nothing where there is no teacher."""
    weight, mask, advantage = (term.get(k) for k in ("weight", "mask", "advantage"))
    asks = kind(weight) in OF_TEACHER or keys(weight).get("of") == "teacher"
    asks = asks or any("teacher" in name for name in keys(weight).get("given", ()))
    floored = keys(keys(advantage).get("log_ratio", advantage)).get("below_floor") == "leave_out"
    entropies = "teacher_entropy_above" in keys(mask)
    return asks or floored or entropies or "distillation" in term["kind"] or kind(advantage) == "log_ratio"


def counted(name: str, term: Any, batch: Batch, route: Any) -> list[list[int]]:
    """Positions that the term counts, per rollout."""
    mask, rows = keys(term.get("mask")), []
    floor = keys(keys(term.get("advantage")).get("log_ratio", term.get("advantage")))
    for i, r in enumerate(batch.rollouts):
        roles = mask.get("roles", ["assistant"])
        places = batch.places(i, roles)[mask.get("skip_first", 0) : mask.get("prefix")]
        if (consults(term) and not batch.has_teacher(i)) or routed_away(name, r, route):
            places = []
        if turns := mask.get("turns"):
            places = [p for p in places if turns.get("from", 1) <= batch.turn(i, p) <= turns.get("to", math.inf)]
        if spans := mask.get("spans"):
            inside = spans.get("count", "inside") == "inside"
            places = [p for p in places if (p in batch.matches(i, spans, roles)) == inside]
        if mask.get("special_tokens") == "leave_out":
            places = [p for p in places if r["completion"][p] != 3]
        if "teacher_entropy_above" in mask:
            limit = mask["teacher_entropy_above"]
            places = [p for p in places if batch.measure("teacher_entropy", i, p) > limit]
        if floor.get("below_floor") == "leave_out":
            places = [p for p in places if batch.log_ratio(i, p) >= floor["floor"]]
        rows.append(places)
    if "student_entropy_top" in mask:
        every = [(i, p) for i, places in enumerate(rows) for p in places]
        order = sorted(every, key=lambda ip: -batch.measure("student_entropy", *ip))
        chosen = order[: math.ceil(mask["student_entropy_top"] * len(order) - 1e-9)]
        rows = [[p for p in places if (i, p) in chosen] for i, places in enumerate(rows)]
    return rows


def routed_away(name: str, rollout: Any, route: Any) -> bool:
    """Whether the route hands the rollout to other terms."""
    if not route:
        return False
    failed = rollout["reward"] < route.get("threshold", 1.0)
    if route["when"] == "failed_with_context":
        failed = failed and rollout.get("teacher") is not None
    return name in route.get("otherwise" if failed else "then", ())


def token_weights(term: Any, batch: Batch, rows: list[list[int]]) -> list[dict[int, float]]:
    """What each counted token weighs, per rollout."""
    spec = keys(term.get("weight"))
    every = [(i, p) for i, places in enumerate(rows) for p in places]
    found: list[dict[int, float]] = [{} for _ in rows]
    for i, p in every:
        rollout = batch.rollouts[i]
        length = len(rollout["completion"])
        group = [x.get("reward", 0) for x in batch.rollouts if x.get("group") == rollout.get("group")]
        match kind(term.get("weight")):
            case "position":
                places = batch.places(i)
                rise = ((places.index(p) + 1) / len(places) - spec["middle"]) / spec["width"]
                weight = spec["smallest"] + (1 - spec["smallest"]) / (1 + math.exp(-rise))
            case "teacher_entropy":
                of = {ip: math.exp(-spec["rate"] * batch.measure("teacher_entropy", *ip)) for ip in every}
                weight = of[i, p] / statistics.mean(of.values())
            case "drift":
                size = {q: abs(gap(batch, i, q)) for q in rows[i]}
                before = sum(size[q] for q in rows[i] if q < p)
                weight = 1 + spec["strength"] * (1 - before / sum(size.values()))
            case "step_agreement":
                by_turn = {t: [abs(gap(batch, i, q)) for q in rows[i] if batch.turn(i, q) == t] for t in range(1, 9)}
                means = {t: statistics.mean(sizes) for t, sizes in by_turn.items() if sizes}
                ratio_to_first = (means[min(means)] + 1e-6) / (means[batch.turn(i, p)] + 1e-6)
                weight = min(ratio_to_first, spec["largest"])
            case "by_turn":
                weight = 1 / batch.turn(i, p)
            case "pass_rate":
                passed = statistics.mean(x >= spec.get("threshold", 1.0) for x in group)
                weight = (passed * (1 - passed)) ** spec.get("power", 0.5)
            case "perplexity":
                weight = perplexity(spec, batch, i, rows)
            case "of_all_statistics":
                told = [
                    batch.measure(f"{a}_{b}", i, p) for a in ("student", "teacher") for b in ("entropy", "logprobs")
                ]
                weight = 1 + p / length + rollout["reward"] + told[0] * told[2] + told[1] * told[3]
            case "minus_group_mean":
                weight = 1 + rollout["reward"] - statistics.mean(group)
            case _:
                weight = 1.0
        found[i][p] = weight
    return found


def gap(batch: Batch, i: int, p: int) -> float:
    """log teacher − log student, as measured."""
    return batch.measure("teacher_logprobs", i, p) - batch.measure("student_logprobs", i, p)


def perplexity(spec: Any, batch: Batch, i: int, rows: list[list[int]]) -> float:
    """The rollout's perplexity to the power, over the mean of its group's counted rollouts."""

    def own(j: int) -> float:
        each = [batch.measure(f"{spec['of']}_logprobs", j, p) for p in rows[j]]
        return math.exp(-statistics.mean(each)) ** spec.get("power", 1.0)

    group = batch.rollouts[i]["group"]
    peers = [j for j, r in enumerate(batch.rollouts) if r["group"] == group and rows[j]]
    return own(i) / statistics.mean(own(j) for j in peers)


def average(spec: Any, batch: Batch, rows: list[list[int]], joint: int) -> list[dict[int, float]]:
    """The factor of each counted token, per rollout."""
    if kind(spec) == "per_turn":
        turns = [[batch.turn(i, p) for p in places] for i, places in enumerate(rows)]
        every = sum(len(set(own)) for own in turns)
        return [
            {p: 1 / (own.count(t) * every) for p, t in zip(places, own, strict=True)}
            for places, own in zip(rows, turns, strict=True)
        ]
    factors = factors_of_rows(spec, rows, joint, sum(len(batch.places(i)) for i in range(len(rows))))
    return [dict.fromkeys(places, factor) for places, factor in zip(rows, factors, strict=True)]


def factors_of_rows(spec: Any, rows: list[list[int]], joint: int, whole: int) -> list[float]:
    """The factor of each rollout's tokens; `whole` is the number of sampled tokens of all completions."""
    sizes, own = [len(places) for places in rows], keys(spec)
    tokens, filled = sum(sizes), sum(n > 0 for n in sizes)
    if kind(spec) in ("", "per_token"):
        chosen = {"own": tokens, "joint": joint, "completions": whole}
        divisors = [chosen[own.get("denominator", "own")] for _ in sizes]
    elif kind(spec) == "per_sequence":
        every = len(sizes) if own.get("empty_rows") == "count" else filled
        divisors = [n * every for n in sizes]
    elif kind(spec) == "sequence_sum":
        divisors = [filled for _ in sizes]
    elif kind(spec) == "constant":
        divisors = [len(sizes) * own["length"] for _ in sizes]
    else:
        divisors = [1 for _ in sizes]
    return [1 / d if d else 0.0 for d in divisors]


def correction(term: Any, batch: Batch, i: int, places: list[int], p: int) -> float:
    """The product of the importance ratios that multiply the token's loss."""
    importance, factor = keys(term.get("importance")), 1.0
    if cap := keys(importance.get("old_policy")).get("cap"):
        factor *= min(math.exp(held(batch.now(i, p)) - batch.then(i, p)), cap)
    if sampler := importance.get("sampler"):
        each = {q: min(math.exp(batch.then(i, q) - batch.rollouts[i]["sampler"][q]), sampler["cap"]) for q in places}
        mean = sampler["level"] == "sequence_mean"
        factor *= statistics.mean(each.values()) if mean else each[p]
    return factor
