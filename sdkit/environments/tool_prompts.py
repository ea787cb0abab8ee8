"""How the tools of environments are shown in prompts, and their results in observations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from attrs import frozen

from sdkit.batches import Row
from sdkit.data.call_formats import choose_format
from sdkit.data.observations import ObservationEncoder
from sdkit.data.prompts import Prompter
from sdkit.environments.interface import Environment
from sdkit.environments.routed import Routed
from sdkit.language import specs
from sdkit.language.errors import blaming


@frozen
class ObservationEncoders:
    """The encoder of an environment, or one for each route, by its name; an encoder's prompter shows the tools."""

    by: str | None  # the column that names a row's route; None: there is one environment, under None
    encoders: Mapping[str | None, ObservationEncoder]

    def of(self, row: Row) -> ObservationEncoder:
        """Return the encoder of a row.  Raises KeyError if its column names no route."""
        return self.encoders[None if self.by is None else row.text(self.by) or ""]

    @property
    def prompters(self) -> list[Prompter]:
        """Every encoder's prompter."""
        return [encoder.prompter for encoder in self.encoders.values()]

    def show_tools(self, prompter: Prompter) -> Prompter:
        """Return a prompter that shows each row the tools of its environment; a row without a route is shown none."""
        if self.by is None:
            return self.encoders[None].prompter
        column, calls = self.by, {name: encoder.prompter.calls for name, encoder in self.encoders.items()}
        return prompter.with_tools_by_row(lambda row: calls.get(row.text(column)))

    def describe(self) -> Iterator[str]:
        """Yields which tools there are, and how they are called, for each route that has some."""
        for name, encoder in self.encoders.items():
            if calls := encoder.prompter.calls:
                yield calls.describe() if name is None else f"route {name}: {calls.describe()}"


def open_encoders(
    prompter: Prompter, end: int | None, spec: specs.Environment, opened: Environment
) -> ObservationEncoders:
    """Return the encoders of an open environment; `end` is the token that ends a turn.

    Raises BadData if the chat template cannot continue a chat, or cannot have the format of calls that the spec names.
    """
    if not isinstance(spec, specs.RoutedEnvironment):
        with blaming("environment"):
            return ObservationEncoders(None, {None: ObservationEncoder(show_tools(prompter, opened, spec), end)})
    assert isinstance(opened, Routed)
    encoders: dict[str | None, ObservationEncoder] = {}
    for name, route in spec.routes.items():
        with blaming("environment", "routes", name):
            encoders[name] = ObservationEncoder(show_tools(prompter, opened.routes[name], route), end)
    return ObservationEncoders(spec.by, encoders)


def show_tools(prompter: Prompter, environment: Environment, spec: specs.OneEnvironment) -> Prompter:
    """Return a prompter that shows the environment's tools, or the same one if it has none.  Raises BadData."""
    if not environment.tools:
        return prompter
    calls = spec.calls if isinstance(spec, specs.CodeEnvironment) else specs.ToolCalls()
    return prompter.with_tools(choose_format(prompter, environment.tools, calls))
