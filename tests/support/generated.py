"""Draws specs over the whole language from the spec classes, as data for a YAML file.

Every kind of every union, every key and every literal can be drawn; numbers come from the accepted range, ends included.
Names refer to each other where the rules ask for that: slots in templates, terms in routes.
"""

import typing

from hypothesis import strategies as st

from sdkit.language.introspection import Key, default_kind, is_spec, keys_of, members
from sdkit.language.specs import FileDivergence, FileWeight, MethodSpec, OptimizerSpec, Schedule, Table, TrainingSpec

WHOLE = (0, 1, 2, 3, 4, 8)
NUMBERS = (0.0, 1e-3, 0.1, 0.25, 0.5, 0.9, 1.0, 1.5, 2.0, 5.0, -0.5, -1.0)
TEXTS = {
    "text": "a hint",
    "name": "demonstration",
    "column": "demonstration",
    "by": "source",
    "wrap": "\n{value}",
    "success": "good",
    "failure": "bad",
    "user": "What is 1 + 1?",
    "assistant": "2",
    "url": "http://127.0.0.1:1",
    "model": "teacher",
    "how_many": "all",
    "path": "./another-model",
    "template": "{prompt}",
}
"""What a key that takes text is given."""
NEEDS_A_FILE = (FileDivergence, FileWeight)
OFTEN = {"rollout", "completions_per_prompt", "teacher", "sees", "slots"}
"""Keys that most specs have; another key that may be left out is drawn one time in four."""
LEFT_TO_OTHERS = {
    "backend": "engines and servers have tests of their own (sampling, serving)",
    "revision": "of models on the hub",
    "tokenizer": "a folder",
    "key_from": "an environment variable",
}
SET_HERE = {TrainingSpec: {"steps", "epochs", "prompts_per_step"}, OptimizerSpec: {"lr"}}
"""Keys that `run_files` gives values of its own; a learning rate at the end of its range ends every run as diverged."""


def method_pages():
    """Returns a strategy for method pages."""
    return st.composite(lambda draw: connect(Drawn(_by_hypothesis(draw)).spec(MethodSpec)))()


def run_files():
    """Returns a strategy for run files: a method with drawn `optimizer` and `training`, on rows with two columns."""

    def run_file(draw):
        drawn = Drawn(_by_hypothesis(draw))
        rows = [{"question": f"What is {n} + 1?", "demonstration": str(n + 1), "source": "a"} for n in range(8)]
        return connect(drawn.spec(MethodSpec)) | {
            "model": {"path": "bundled:smollm2-135m-instruct", "dtype": "float32"},
            "data": {
                "source": {"kind": "inline", "rows": rows},
                "columns": {"prompt": "question", "demonstration": "demonstration"},
            },
            "rewards": {"any": {"kind": "regex", "pattern": "a"}},
            "optimizer": drawn.spec(OptimizerSpec) | {"lr": drawn.one_of((1e-6, 1e-3, 0.01))},
            "training": drawn.spec(TrainingSpec) | {"steps": 2, "prompts_per_step": 2},
        }

    return st.composite(run_file)()


def _by_hypothesis(draw):
    return lambda choices: draw(st.sampled_from(choices))


class Drawn:
    """Draws values of types: `choose` returns one entry of a list; `texts` replaces values of keys that take text."""

    def __init__(self, choose, texts=None):
        self.choose, self.texts = choose, TEXTS | (texts or {})

    def one_of(self, choices):
        return self.choose(list(choices))

    def spec(self, cls):
        """Returns a map of the class' keys: all required ones and some of the others."""
        drawn = {}
        for key in keys_of(cls).values():
            if key.name in LEFT_TO_OTHERS or key.name in SET_HERE.get(cls, ()):
                continue
            if key.required or self.one_of([True, *[key.name in OFTEN] * 8, False, False, False]):
                drawn[key.name] = self.value(key.type, key)
        return drawn

    def value(self, tp, key):
        """Returns a value of the type."""
        options = [option for option in members(tp) if option not in NEEDS_A_FILE]
        option = options[0] if Schedule in options and self.one_of([True, True, False]) else self.one_of(options)
        origin = typing.get_origin(option)
        if option is type(None):
            return None
        if origin is typing.Literal:
            return self.one_of(typing.get_args(option))
        if origin is Table:
            names = ["first", "second"][: self.one_of([1, 1, 2])]
            return {name: self.value(typing.get_args(option)[0], _entry(key)) for name in names}
        if origin is tuple:
            entries = typing.get_args(option)
            if entries[-1] is Ellipsis:
                count = self.one_of([1, 1, 2])
                return [self.value(entries[0], _entry(key)) for _ in range(count)]
            return [self.value(entry, _entry(key)) for entry in entries]
        if option is Schedule:
            ends = {end: self.scalar(float, key) for end in ("from", "to")}
            return ends | {"steps": self.one_of((1, 2, 8)), "shape": self.one_of(("linear", "cosine"))}
        if is_spec(option):
            classes = frozenset(o for o in members(tp) if is_spec(o))
            named = hasattr(option, "kind") and (len(classes) > 1 or default_kind(classes))
            return ({"kind": option.kind} if named else {}) | self.spec(option)
        return self.scalar(option, key)

    def scalar(self, option, key):
        """Returns text, a number or a truth value."""
        if option is bool:
            return self.one_of([False, True])
        if option is str:
            return self.texts.get(key.name, "x")
        ends = key.range.ends if key.range and key.range.ends else ()
        candidates = [option(n) for n in (*(WHOLE if option is int else NUMBERS), *ends)]
        accepted = [n for n in candidates if key.range is None or key.range.accepts(n)]
        return self.one_of(accepted)


def _entry(key: Key) -> Key:
    """Returns the key as one of its entries sees it: with the range of entries."""
    from attrs import evolve

    return evolve(key, range=key.each, each=None)


def connect(page):
    """Makes templates name all their slots, a route name terms of the page, and written slots have a writer."""
    losses = list(page["losses"])
    if page.get("route"):
        page["route"]["then"] = losses[:1]
        if page["route"].get("otherwise"):
            page["route"]["otherwise"] = losses[1:]
    sees = (page.get("teacher") or {}).get("sees")
    if sees and sees.get("slots"):
        names = " ".join(f"{{{name}}}" for name in sees["slots"])
        if "turns" in sees:
            sees["turns"][0]["user"] = names
        else:
            sees["template"] = "{prompt} " * (sees["kind"] == "user_turn") + names
    if sees:
        _connect_writer(sees)
    return page


def _connect_writer(sees):
    """Leaves a writer only to written slots, of which none gives way to another."""
    drawn = sees.pop("writer", None) or {}
    written = [slot for slot in sees.get("slots", {}).values() if slot["kind"] == "written"]
    for slot in written:
        slot.pop("unless", None)
    if written:
        names = "".join(f" {{{name}}}" for name in drawn.get("slots", ()))
        kept = {key: value for key, value in drawn.items() if key not in ("url", "key_from")}
        sees["writer"] = kept | {"model": "w", "prompt": "{trajectory}" + names}
