"""The clients of a run's servers, connected and checked before anything heavy is loaded."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attrs import frozen

from sdkit.language import specs
from sdkit.language.errors import SdkitError, blaming
from sdkit.models.loading import check_vocabulary, load_config, load_tokenizer, resolve_model, weights_folder
from sdkit.serving.pool import ServerPool
from sdkit.serving.protocol import ExpectedServer
from sdkit.serving.teacher_client import ServedModel
from sdkit.serving.weight_files import WeightFolder
from sdkit.serving.writer import WriterClient
from sdkit.stdout import is_first_rank
from sdkit.train.replay import Recording


@frozen(eq=False, kw_only=True)
class Clients:
    """The clients of a run's servers."""

    served: Mapping[specs.ServedWeights, ServedModel]
    servers: ServerPool | None  # rollout servers; on the first rank only
    writer: WriterClient | None


def connect_teachers(spec: specs.ExperimentSpec, base: Path, tokenizer: Any) -> dict[specs.ServedWeights, ServedModel]:
    """A client for each served teacher, checked before anything heavy is loaded."""
    models: dict[specs.ServedWeights, ServedModel] = {}
    for _, weights in spec.served_teachers():
        if weights in models:
            continue
        if weights.tokenizer:
            source = specs.ExternalWeights(path=weights.tokenizer)
            other = load_tokenizer(source, resolve_model(weights.tokenizer, base))
            check_vocabulary(tokenizer, other, weights.tokenizer)
        models[weights] = ServedModel(weights, spec.served_top_k or 0, os.environ)
        models[weights].check(tokenizer)
    return models


def connect_writer(spec: specs.ExperimentSpec, recording: Recording | None) -> WriterClient | None:
    """A client for the writer of the teacher's context, checked unless the answers are those of a recording."""
    if spec.writer is None:
        return None
    client = WriterClient(spec.writer, os.environ)
    if not (recording and recording.has_writer) and not isinstance(spec.rollout.backend, specs.ReplayBackend):
        with blaming("teacher", "sees", "writer"):
            client.check()
    return client


def connect_servers(spec: specs.ExperimentSpec, base: Path, located: str) -> ServerPool | None:
    """The rollout servers, checked; None on every rank but the first, which alone talks to them."""
    backend = spec.rollout.backend
    if not isinstance(backend, specs.VllmServerBackend) or not is_first_rank():
        return None

    def warn(text: str) -> None:
        print(f"warning: {text}", file=sys.stderr, flush=True)

    with blaming("rollout", "backend"):
        expected = ExpectedServer(
            config=load_config(spec.model, located),
            dtype=backend.dtype or spec.model.dtype,
            folder=WeightFolder(weights_folder(backend, base)),
        )
        try:
            pool = ServerPool(backend, expected, os.environ, warn)
            pool.check()
        except SdkitError:
            expected.folder.close()
            raise
        return pool
