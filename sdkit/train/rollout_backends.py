"""The rollout backends of a run, each opened once, and the weights that each has loaded."""

from __future__ import annotations

from typing import assert_never

from sdkit.batches import RolloutBackend
from sdkit.language.errors import blaming
from sdkit.language.specs import ReplayBackend, TransformersBackend, VllmBackend, VllmEngine, VllmServerBackend
from sdkit.models.weights import Weights
from sdkit.plan.plan import ChosenBackend
from sdkit.sampling.canary import draw_canary
from sdkit.sampling.replay import ReplayRollouts
from sdkit.sampling.transformers import TransformersRollouts
from sdkit.sampling.vllm import VllmRollouts
from sdkit.serving.pool import ServerPool
from sdkit.serving.rollouts import ServerRollouts
from sdkit.stdout import quiet
from sdkit.train.models import Models
from sdkit.train.setup import RunSetup


class RolloutBackends:
    """Opens the plan's backends, at the latest on first use, and loads weights into them only when they changed."""

    def __init__(self, setup: RunSetup, models: Models, pool: ServerPool | None) -> None:
        self.setup = setup
        self.models = models
        self.pool = pool  # of rollout servers; on the first rank only
        self._backends: dict[str, RolloutBackend] = {}  # by kind, as is `_loaded`
        self._loaded: dict[str, tuple[int, int]] = {}  # id() of the weights, their version

    def load(
        self, weights: Weights, version: int, *, evaluation: bool = False
    ) -> tuple[RolloutBackend, dict[str, float]]:
        """Return the backend with these weights loaded, and the metrics of the transfer (none if nothing moved)."""
        plan = self.setup.plan
        spec = plan.evaluation_backend if evaluation else plan.backend
        if weights.foreign and isinstance(spec, VllmEngine):
            spec = TransformersBackend()  # vLLM's engine has the student's architecture
        backend = self.open(spec)
        if self._loaded.get(spec.kind) == (id(weights), version):
            return backend, {}
        metrics = dict(backend.load(weights, version))
        self._loaded[spec.kind] = id(weights), version
        return backend, metrics

    def servers(self) -> ServerRollouts:
        """Return the backend of the rollout servers, whose weights the caller may replace."""
        self._loaded.pop(VllmServerBackend.kind, None)
        backend = self.open(self.setup.plan.backend)
        assert isinstance(backend, ServerRollouts), "the plan's backend is no rollout server"
        return backend

    def server_messages(self) -> list[str]:
        """Return the messages about rollout servers since the last call."""
        queue = self.pool.messages if self.pool else []
        messages = queue[:]
        del queue[: len(messages)]  # the pool's threads may have added more meanwhile
        return messages

    def sleep(self) -> None:
        """Free the GPU memory of vLLM's engine in this process, if the spec says so; the next `load` wakes it."""
        backend = self._backends.get(VllmBackend.kind)
        if isinstance(backend, VllmRollouts) and backend.sleep():
            self._loaded.pop(VllmBackend.kind, None)

    def close(self) -> None:
        """Close every open backend, and the server pool even if no backend has used it."""
        for backend in self._backends.values():
            backend.close()
        if self.pool and VllmServerBackend.kind not in self._backends:
            self.pool.close()

    def open(self, spec: ChosenBackend | ReplayBackend) -> RolloutBackend:
        """Return the backend of this kind, which is opened if it is not open yet."""
        if spec.kind not in self._backends:
            with blaming("rollout", "backend"):
                self._backends[spec.kind] = self._open(spec)
        return self._backends[spec.kind]

    def _open(self, spec: ChosenBackend | ReplayBackend) -> RolloutBackend:
        setup, models = self.setup, self.models
        match spec:
            case TransformersBackend():
                rows = spec.batch_size if models.pads_samples else 1
                return TransformersRollouts(setup.data.tokenizer, rows, models.end_ids)
            case VllmBackend():
                dtype, longest = setup.spec.model.dtype, setup.longest_sequence
                with quiet():
                    return VllmRollouts(spec, setup.model_folder, dtype, longest, models.end_ids)
            case VllmServerBackend():
                vocabulary = models.student.causal.config.get_text_config().vocab_size
                canary = draw_canary(spec, setup.spec.model.dtype, vocabulary, setup.longest_sequence)
                return ServerRollouts(self.pool, canary, models.end_ids, vocabulary)
            case ReplayBackend():
                return ReplayRollouts((setup.base / spec.run).resolve())
            case _:
                assert_never(spec)
