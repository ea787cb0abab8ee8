"""What a run holds open: models, learner, rollout sampler, clients of servers, and its progress."""

from __future__ import annotations

from collections.abc import Mapping

from attrs import field, frozen

from sdkit.checkpoints.checkpoint import Progress, TrainState
from sdkit.distributed import collectives, health
from sdkit.language.specs import ServedWeights, VllmServerBackend
from sdkit.serving.teacher_client import ServedModel
from sdkit.train.clients import Clients
from sdkit.train.learner import Learner, open_learner
from sdkit.train.models import Models, open_models
from sdkit.train.prefetch import RolloutPrefetcher
from sdkit.train.rollout_backends import RolloutBackends
from sdkit.train.rollout_sampler import RolloutSampler
from sdkit.train.setup import RunSetup
from sdkit.train.step_specs import StepSpecs, step_specs


@frozen(eq=False, kw_only=True)
class Trainer:
    """The open parts of a run.  Only run.py and loop.py hold it; every other function takes the parts that it reads."""

    setup: RunSetup
    models: Models
    learner: Learner
    sampler: RolloutSampler
    served: Mapping[ServedWeights, ServedModel]
    progress: Progress = field(factory=Progress)

    @property
    def state(self) -> TrainState:
        """What a checkpoint stores."""
        return TrainState(
            zero=self.learner.zero,
            teacher=self.models.teacher,
            prefetched=self.sampler.prefetcher,
            progress=self.progress,
        )

    @property
    def specs(self) -> StepSpecs:
        """The specs of the next optimizer step, without schedules."""
        total = self.setup.plan.total_updates
        assert total is not None, "steps are known once the data are loaded"
        return step_specs(self.setup.spec, self.progress.optimizer_steps, total)

    def close(self, *, together: bool = True) -> None:
        """Free DeepSpeed's engines, then the backends: closing vLLM destroys the process group.

        `together` is False if other ranks may not get here, so that this rank does not wait for them.
        """
        for model in self.served.values():
            model.close()
        if self.sampler.writer:
            self.sampler.writer.close()
        self.learner.close()
        if together:
            collectives.barrier()
            health.stop()  # from here on the ranks end one by one
        self.sampler.backends.close()
        self.setup.data.close()


def open_trainer(setup: RunSetup, clients: Clients) -> Trainer:
    """Load the models and DeepSpeed; backends open later."""
    models = open_models(setup, clients.served)
    learner = open_learner(setup, models)
    backends = RolloutBackends(setup, models, clients.servers)
    prefetcher = None
    if setup.spec.rollout.max_staleness and isinstance(setup.plan.backend, VllmServerBackend):
        prefetcher = RolloutPrefetcher(setup, models, backends)
    sampler = RolloutSampler(
        setup=setup, models=models, backends=backends, prefetcher=prefetcher, writer=clients.writer
    )
    return Trainer(setup=setup, models=models, learner=learner, sampler=sampler, served=clients.served)
