"""Every spec class of the language.

Rooms: `fields` (how a class is declared), `rollouts`, `contexts`, `teachers`, `blends`, `losses`, `divergences` and
`token_weights` (what makes a `method`), `data`, `scores` and `run`.
"""

from sdkit.specs.blends import *  # noqa: F403
from sdkit.specs.contexts import *  # noqa: F403
from sdkit.specs.data import *  # noqa: F403
from sdkit.specs.divergences import *  # noqa: F403
from sdkit.specs.fields import *  # noqa: F403
from sdkit.specs.losses import *  # noqa: F403
from sdkit.specs.method import *  # noqa: F403
from sdkit.specs.rollouts import *  # noqa: F403
from sdkit.specs.run import *  # noqa: F403
from sdkit.specs.scores import *  # noqa: F403
from sdkit.specs.teachers import *  # noqa: F403
from sdkit.specs.token_weights import *  # noqa: F403
