"""The rollout backends of a run, opened on first use, and the weights that each has loaded."""

from __future__ import annotations

from pathlib import Path
from typing import assert_never

from sdkit.batches import RolloutBackend
from sdkit.language.errors import blaming
from sdkit.language.specs import (
    ExperimentSpec,
    ReplayBackend,
    TransformersBackend,
    VllmBackend,
    VllmEngine,
    VllmServerBackend,
)
from sdkit.models.weights import Weights
from sdkit.plan.plan import ChosenBackend, Plan
from sdkit.sampling.canary import draw_canary
from sdkit.sampling.replay import ReplayRollouts
from sdkit.sampling.transformers import TransformersRollouts
from sdkit.sampling.vllm import VllmRollouts
from sdkit.serving.pool import ServerPool
from sdkit.serving.rollouts import ServerRollouts
from sdkit.stdout import quiet
from sdkit.train.inputs import RunData


class RolloutBackends:
    """Opens the plan's backends and loads weights into them, each only when needed."""

    def __init__(
        self,
        spec: ExperimentSpec,
        plan: Plan,
        base: Path,
        data: RunData,
        student: Weights,
        *,
        model_folder: str,
        longest_sequence: int,
        end_ids: tuple[int, ...],
        pads_samples: bool,
        pool: ServerPool | None,
    ) -> None:
        self.spec = spec
        self.plan = plan
        self.base = base
        self.data = data
        self.student = student
        self.model_folder = model_folder
        self.longest_sequence = longest_sequence
        self.end_ids = end_ids
        self.pads_samples = pads_samples
        self.pool = pool
        self._backends: dict[str, RolloutBackend] = {}  # by kind, as is `_loaded`
        self._loaded: dict[str, tuple[int, int]] = {}  # id() of the weights, their version

    def load(
        self, weights: Weights, version: int, *, evaluation: bool = False
    ) -> tuple[RolloutBackend, dict[str, float]]:
        """Return the backend with these weights loaded, and the metrics of the transfer (none if nothing moved)."""
        spec = self.plan.evaluation_backend if evaluation else self.plan.backend
        if weights.foreign and isinstance(spec, VllmEngine):
            spec = TransformersBackend()  # vLLM's engine has the student's architecture
        backend = self._get_or_open(spec)
        if self._loaded.get(spec.kind) == (id(weights), version):
            return backend, {}
        metrics = dict(backend.load(weights, version))
        self._loaded[spec.kind] = id(weights), version
        return backend, metrics

    def servers(self) -> ServerRollouts:
        """Return the backend of the rollout servers, whose weights the caller may replace."""
        self._loaded.pop(VllmServerBackend.kind, None)
        backend = self._get_or_open(self.plan.backend)
        assert isinstance(backend, ServerRollouts), "the plan's backend is no rollout server"
        return backend

    def close(self) -> None:
        """Close every open backend, and the server pool even if no backend has used it."""
        for backend in self._backends.values():
            backend.close()
        if self.pool and VllmServerBackend.kind not in self._backends:
            self.pool.close()

    def _get_or_open(self, spec: ChosenBackend | ReplayBackend) -> RolloutBackend:
        if spec.kind not in self._backends:
            with blaming("rollout", "backend"):
                self._backends[spec.kind] = self._open(spec)
        return self._backends[spec.kind]

    def _open(self, spec: ChosenBackend | ReplayBackend) -> RolloutBackend:
        match spec:
            case TransformersBackend():
                rows = spec.batch_size if self.pads_samples else 1
                return TransformersRollouts(self.data.tokenizer, rows, self.end_ids)
            case VllmBackend():
                with quiet():
                    return VllmRollouts(
                        spec, self.model_folder, self.spec.model.dtype, self.longest_sequence, self.end_ids
                    )
            case VllmServerBackend():
                vocabulary = self.student.causal.config.get_text_config().vocab_size
                canary = draw_canary(spec, self.spec.model.dtype, vocabulary, self.longest_sequence)
                return ServerRollouts(self.pool, canary, self.end_ids)
            case ReplayBackend():
                return ReplayRollouts((self.base / spec.run).resolve())
            case _:
                assert_never(spec)
