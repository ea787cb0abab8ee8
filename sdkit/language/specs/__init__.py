"""Every spec class of the language.

`fields` has the means to declare a class.  `rollouts`, `backends`, `contexts`, `teachers`, `blends`, `losses`,
`divergences`, `advantages`, `token_weights` and `loss_parts` make up a `method`; `data`, `scores`, `evaluation`,
`environments`, `environment_kinds`, `collapse` and `run` have what a run needs besides; `sequences` are runs one after the other.
"""

from sdkit.language.specs.advantages import *  # noqa: F403
from sdkit.language.specs.backends import *  # noqa: F403
from sdkit.language.specs.blends import *  # noqa: F403
from sdkit.language.specs.collapse import *  # noqa: F403
from sdkit.language.specs.contexts import *  # noqa: F403
from sdkit.language.specs.data import *  # noqa: F403
from sdkit.language.specs.divergences import *  # noqa: F403
from sdkit.language.specs.environment_kinds import *  # noqa: F403
from sdkit.language.specs.environments import *  # noqa: F403
from sdkit.language.specs.evaluation import *  # noqa: F403
from sdkit.language.specs.fields import *  # noqa: F403
from sdkit.language.specs.loss_parts import *  # noqa: F403
from sdkit.language.specs.losses import *  # noqa: F403
from sdkit.language.specs.method import *  # noqa: F403
from sdkit.language.specs.rollouts import *  # noqa: F403
from sdkit.language.specs.run import *  # noqa: F403
from sdkit.language.specs.scores import *  # noqa: F403
from sdkit.language.specs.sequences import *  # noqa: F403
from sdkit.language.specs.teachers import *  # noqa: F403
from sdkit.language.specs.token_weights import *  # noqa: F403
