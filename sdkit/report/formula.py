"""The objective of a spec as MathML, which browsers show without a library.

At token t of a completion y, S is the student's distribution under its own prompt, T the teacher's (or the blend's), and R
the start model's under the student's prompt; sg stops the gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import assert_never

from sdkit.language.specs import (
    Average,
    Constant,
    CrossEntropy,
    Distillation,
    Divergence,
    FileDivergence,
    ForwardKl,
    Jsd,
    LinearMix,
    Loss,
    MethodSpec,
    PerSequence,
    PerToken,
    PerTurn,
    PolicyGradient,
    ReferenceKl,
    ReverseKl,
    SampledTokenSupport,
    SequenceSum,
    SkewedForwardKl,
    SkewedReverseKl,
    Sum,
)
from sdkit.language.specs.fields import always

S, T, R, M = (f"<msub><mi>{name}</mi><mi>t</mi></msub>" for name in "STRM")
Y = "<mo>(</mo><msub><mi>y</mi><mi>t</mi></msub><mo>)</mo>"
LOG = "<mi>log</mi><mo>&#x2061;</mo>"
ADVANTAGE = "<msub><mi>A</mi><mi>t</mi></msub>"
RATIO = "<msub><mi>ρ</mi><mi>t</mi></msub>"


def formulas(spec: MethodSpec) -> list[str]:
    """The objective and each of its terms, as elements `math`."""
    return [_math(_objective(spec)), *(_math(_term(name, term)) for name, term in spec.losses.items())]


def legend(spec: MethodSpec) -> Iterator[str]:
    """What the symbols stand for, as sentences."""
    terms = list(spec.losses.values())
    yield "y is a completion, t one of its tokens; the sums run over the counted tokens of a rollout batch"
    yield "S is the student under its own prompt"
    if any(term.needs_teacher for term in terms):
        yield "T is the " + ("blend" if spec.blend else "teacher under the teacher's prompt")
    if any(isinstance(term, ReferenceKl) for term in terms):
        yield "R is the start model under the student's prompt"
    if any(term.token_weight for term in terms):
        yield "w is a token's weight"
    if any(isinstance(term, PolicyGradient) for term in terms):
        yield "A is the advantage, ρ the ratio of S to the student before this batch"
    if any(term.sampler_ratio for term in terms):
        yield "ρ of the sampler is the ratio of S to the sampler's probabilities"
    if any(isinstance(term, Distillation) and term.importance.old_policy for term in terms):
        yield "old ρ is the ratio of S to the student before this batch"
    if any("<mi>sg</mi>" in line for line in formulas(spec)):
        yield "sg[·] stops the gradient"


def _math(content: str) -> str:
    return f'<math display="block"><mrow>{content}</mrow></math>'


def _objective(spec: MethodSpec) -> str:
    factors = {name: "" if always(t.coefficient, 1) else _number(t.coefficient) for name, t in spec.losses.items()}
    terms = [f"{factor}<mo>·</mo>{_loss_of(name)}" if factor else _loss_of(name) for name, factor in factors.items()]
    return "<mi>ℒ</mi><mo>=</mo>" + "<mo>+</mo>".join(terms)


def _term(name: str, term: Loss) -> str:
    return f"{_loss_of(name)}<mo>=</mo>{_average(term.average)}{_weights(term)}{_token_loss(term)}"


def _loss_of(name: str) -> str:
    return f"<msub><mi>ℒ</mi>{_text(name)}</msub>"


def _average(average: Average) -> str:
    tokens = _sum("<mi>t</mi>")
    sequences = _sum("<mi>y</mi>")
    per_sequence = f"{_fraction('<mn>1</mn>', _text('sequences'))}{sequences}"
    match average:
        case PerToken(denominator="own"):
            return _fraction("<mn>1</mn>", _text("tokens")) + sequences + tokens
        case PerToken(denominator="joint"):
            return _fraction("<mn>1</mn>", _text("tokens of joint terms")) + sequences + tokens
        case PerToken():
            return _fraction("<mn>1</mn>", _text("tokens of all completions")) + sequences + tokens
        case PerSequence():
            return per_sequence + _fraction("<mn>1</mn>", _text("tokens of y")) + tokens
        case PerTurn():
            turns = _sum("<mi>u</mi>")
            share = _fraction("<mn>1</mn>", _text("tokens of turn u"))
            return _fraction("<mn>1</mn>", _text("turns")) + turns + share + tokens
        case SequenceSum():
            return per_sequence + tokens
        case Constant():
            below = f"{_text('sequences')}<mo>·</mo>{_number(average.length)}"
            return _fraction("<mn>1</mn>", below) + sequences + tokens
        case Sum():
            return sequences + tokens
        case _:
            assert_never(average)


def _weights(term: Loss) -> str:
    """The factors of a token's loss: its weight and its importance ratios."""
    factors = ["<msub><mi>w</mi><mi>t</mi></msub>"] if term.token_weight else []
    old = term.importance.old_policy if isinstance(term, Distillation) else None
    for ratio, name in ((old, "old"), (term.sampler_ratio, "sampler")):
        if ratio:
            share = f"<msubsup><mi>ρ</mi><mi>t</mi>{_text(name)}</msubsup>"
            factors.append(f"<mi>sg</mi><mo>[</mo>{_least(share, _number(ratio.cap))}<mo>]</mo>")
    return "".join(f"{factor}<mo>·</mo>" for factor in factors)


def _token_loss(term: Loss) -> str:
    match term:
        case Distillation(support=SampledTokenSupport()):
            ratio = f"{LOG}{S}{Y}<mo>−</mo>{LOG}{T}{Y}"
            return f"<mi>sg</mi><mo>[</mo>{ratio}<mo>]</mo><mo>·</mo>{LOG}{S}{Y}"
        case Distillation():
            return _divergence(term.divergence, term.support.top_k)
        case CrossEntropy():
            return f"<mo>(</mo><mo>−</mo>{LOG}{S}{Y}<mo>)</mo>"
        case PolicyGradient(clip=None):
            return f"<mo>(</mo><mo>−</mo>{RATIO}{ADVANTAGE}<mo>)</mo>"
        case PolicyGradient(clip=clip):
            assert clip is not None
            low, high = f"<mn>1</mn><mo>−</mo>{_number(clip.low)}", f"<mn>1</mn><mo>+</mo>{_number(clip.high)}"
            clipped = f"{_call('clip', RATIO, low, high)}<mo>·</mo>{ADVANTAGE}"
            return f"<mo>(</mo><mo>−</mo>{_least(f'{RATIO}{ADVANTAGE}', clipped)}<mo>)</mo>"
        case ReferenceKl(estimator="k2"):
            ratio = f"<mo>(</mo>{LOG}{S}{Y}<mo>−</mo>{LOG}{R}{Y}<mo>)</mo>"
            return f"{_fraction('<mn>1</mn>', '<mn>2</mn>')}<msup><mrow>{ratio}</mrow><mn>2</mn></msup>"
        case ReferenceKl():
            return _kl(S, R)
        case _:
            assert_never(term)


def _divergence(divergence: Divergence, k: int) -> str:
    match divergence:
        case ForwardKl():
            return _kl(T, S, k)
        case ReverseKl():
            return _kl(S, T, k)
        case Jsd(teacher_share=s):
            mixture = _mixture(s)
            parts = f"{_rest(s)}{_kl(S, M, k)}<mo>+</mo>{_number(s)}<mo>·</mo>{_kl(T, M, k)}"
            return f"<mo>[</mo>{parts}<mo>]</mo>{_where(mixture)}"
        case LinearMix(forward_share=s):
            return f"<mo>[</mo>{_number(s)}<mo>·</mo>{_kl(T, S, k)}<mo>+</mo>{_rest(s)}{_kl(S, T, k)}<mo>]</mo>"
        case SkewedForwardKl(share=s):
            return _kl(T, M, k) + _where(_mixture(s))
        case SkewedReverseKl(share=s):
            return _kl(S, M, k) + _where(f"{M}<mo>=</mo>{_number(s)}<mo>·</mo>{S}<mo>+</mo>{_rest(s)}{T}")
        case FileDivergence(function=name):
            return _call(name, S, T)
        case _:
            assert_never(divergence)


def _mixture(teacher_share: float) -> str:
    return f"{M}<mo>=</mo>{_rest(teacher_share)}{S}<mo>+</mo>{_number(teacher_share)}<mo>·</mo>{T}"


def _where(definition: str) -> str:
    return f'<mspace width="1em"></mspace>{_text("with")}<mspace width="0.5em"></mspace>{definition}'


def _rest(share: float) -> str:
    return f"<mo>(</mo><mn>1</mn><mo>−</mo>{_number(share)}<mo>)</mo><mo>·</mo>"


def _kl(first: str, second: str, k: int = 0) -> str:
    """KL(first‖second); `k`: over a support of the k likeliest tokens."""
    name = f"<msub><mi>KL</mi>{_text(f'top {k}')}</msub>" if k else "<mi>KL</mi>"
    return f'{name}<mo>(</mo>{first}<mo stretchy="false">‖</mo>{second}<mo>)</mo>'


def _least(first: str, second: str) -> str:
    return _call("min", first, second)


def _call(name: str, *arguments: str) -> str:
    return f"<mi>{escape(name)}</mi><mo>(</mo>{'<mo>,</mo>'.join(arguments)}<mo>)</mo>"


def _sum(index: str) -> str:
    return f"<msub><mo>∑</mo>{index}</msub>"


def _fraction(above: str, below: str) -> str:
    return f"<mfrac><mrow>{above}</mrow><mrow>{below}</mrow></mfrac>"


def _number(value: float) -> str:
    """A number, or a schedule in brackets."""
    text = f"{value:g}"
    return f"<mn>{text}</mn>" if text.replace(".", "").isdecimal() else f"<mo>(</mo>{_text(text)}<mo>)</mo>"


def _text(text: str) -> str:
    return f"<mtext>{escape(text)}</mtext>"
