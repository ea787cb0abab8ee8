"""Names chosen by the user, which become parts of metric names."""

from __future__ import annotations

from collections.abc import Iterator

from sdkit.language.errors import Path, shorten
from sdkit.language.metric_names import FAMILIES, INTERVAL_SUFFIXES, LENGTH_METRIC, MEASURES, SCORE_PREFIXES
from sdkit.language.rules.base import Context, Finding, method_rule, run_rule
from sdkit.language.specs import ExperimentSpec, MethodSpec


@method_rule("no name collides with sdkit's metrics")
def reserved_name(spec: MethodSpec, context: Context) -> Iterator[Finding]:
    """A term's metrics are named TERM/FIGURE, a suite's eval/SUITE/….  A name that other metrics already begin
    with could give two figures the same name.
    """
    paths: list[Path] = [("losses", name) for name in spec.losses]
    if isinstance(spec, ExperimentSpec):
        paths += [("rewards", name) for name in spec.rewards if name in MEASURES or name.startswith(SCORE_PREFIXES)]
        paths += [("evaluation", "suites", name) for name in spec.suites]
        paths += [(*path, name) for path, decodings in spec.decodings() for name in decodings]
    for path in paths:
        if path[0] == "rewards" or path[-1] in FAMILIES or path[-1] == LENGTH_METRIC:
            yield path, f"{shorten(path[-1])} stands in the names of sdkit's own metrics", "choose another name"


@run_rule("no two scores have the same name")
def ambiguous_score(spec: ExperimentSpec, context: Context) -> Iterator[Finding]:
    """A score is named eval/SUITE/DECODING/REWARD, its interval has the suffixes _low, _high and _n, and the suite's
    losses are named eval/SUITE/TERM/….
    """
    for name in spec.rewards:
        for end in INTERVAL_SUFFIXES:
            if name.endswith(end) and (other := name.removesuffix(end)) in spec.rewards:
                message = f"{shorten(name)} is how the interval of {shorten(other)} is written"
                yield ("rewards", name), message, "choose another name"
    for path, decodings in spec.decodings():
        for name in decodings:
            if name in spec.losses:
                message = f"{shorten(name)} is a term of the losses too"
                yield (*path, name), message, "choose another name for this decoding"
