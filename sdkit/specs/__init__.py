"""Every spec class of the language, in three rooms: `fields` (how a class is declared), `method`, `run`."""

from sdkit.specs.fields import *  # noqa: F403
from sdkit.specs.method import *  # noqa: F403
from sdkit.specs.run import *  # noqa: F403
