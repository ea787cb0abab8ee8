"""The training steps to measure, as data that both sides read."""

from __future__ import annotations

from typing import Literal

from attrs import evolve, frozen

Side = Literal["TRL", "sdkit", "sdkit, vLLM"]
"""What runs a shape: TRL or sdkit, both sampling with transformers' `generate`, or sdkit sampling with vLLM."""
GENERATE: tuple[Side, ...] = ("TRL", "sdkit")


@frozen(kw_only=True)
class Shape:
    """A training step: a model, a batch and an objective."""

    name: str
    about: str  # what distinguishes it, for the page
    trainer: Literal["sdft", "sdpo"] = "sdft"  # `sdpo` shows its teacher a successful completion of the same group
    vocabulary: int | None = (
        None  # of a model with four layers of width 256 and random weights; None: the bundled 135M
    )
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    prompts: int = 16
    group: int = 1  # completions per prompt
    prompt_words: int = 40  # drawn words in the prompt; the chat template and the task add about 45 tokens
    max_new_tokens: int = 32
    support: Literal["vocabulary", "top_k", "sampled_token"] = "vocabulary"
    lora: bool = False
    steps: int = 3  # the first one is reported apart
    sides: tuple[Side, ...] = GENERATE
    ranks: int = 1  # of sdkit

    @property
    def batch(self) -> str:
        return f"{self.prompts} × {self.group} × {self.max_new_tokens}"


SDFT = Shape(name="sdft", about="forward KL over the vocabulary", sides=(*GENERATE, "sdkit, vLLM"))
EXTRA = evolve(SDFT, sides=GENERATE)
WIDE = evolve(EXTRA, name="wide", about="V 152k, width 256", vocabulary=151_936, prompts=28, max_new_tokens=62)
SDPO = Shape(
    name="sdpo",
    about="JSD over the student's top 100 and a tail bucket, prompts of 450 tokens",
    trainer="sdpo",
    prompts=2,
    group=8,
    prompt_words=412,
    max_new_tokens=48,
    support="top_k",
    steps=2,
    sides=("TRL", "sdkit, vLLM"),
)
MAIN = (SDFT, SDPO, WIDE)
"""What is measured by default."""
FURTHER = (
    evolve(EXTRA, name="float32", about="float32", dtype="float32"),
    evolve(EXTRA, name="lora", about="LoRA, rank 16 on all linear layers", lora=True),
    evolve(EXTRA, name="top-k", about="top 100 and a tail bucket", support="top_k"),
    evolve(EXTRA, name="sampled", about="reverse KL of the sampled token", support="sampled_token"),
    evolve(EXTRA, name="groups", about="groups of 8, prompts of 158 tokens", prompts=2, group=8, prompt_words=120),
    evolve(EXTRA, name="64", about="completions of 64", prompts=8, max_new_tokens=64),
    evolve(EXTRA, name="256", about="completions of 256", prompts=4, max_new_tokens=256, steps=2),
    evolve(EXTRA, name="2048", about="completions of 2,048", prompts=1, max_new_tokens=2048, steps=2),
    evolve(WIDE, name="wide-49k", about="V 49k, width 256", vocabulary=49_152),
    evolve(WIDE, name="wide-top-k", about="V 152k, top 100 and a tail bucket", support="top_k"),
    evolve(WIDE, name="wide-sampled", about="V 152k, the sampled token", support="sampled_token"),
)


def _point(axis: str, value: int, **changes: object) -> Shape:
    base = evolve(SDFT, sides=("sdkit, vLLM",))
    return evolve(base, name=f"{axis} {value}", about=axis, **changes)  # pyright: ignore[reportArgumentType]


SCALING = {
    "completion tokens": tuple(
        _point("completion tokens", n, prompts=4, max_new_tokens=n) for n in (32, 64, 128, 256)
    ),
    "group size": tuple(_point("group size", g, prompts=16 // g, group=g, prompt_words=120) for g in (1, 2, 4, 8)),
    "vocabulary": tuple(
        _point("vocabulary", v, vocabulary=v, prompts=16, max_new_tokens=62) for v in (49_152, 98_304, 151_936)
    ),
    "ranks": tuple(_point("ranks", r, ranks=r) for r in (1, 2)),
}
"""By axis: the shapes whose name ends in the axis' value; everything else is equal."""
