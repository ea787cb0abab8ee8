"""A world on the tiny model, opened from a few lines of spec."""

import pytest

from sdkit.specs import (
    ColumnSlot,
    DataSpec,
    Distillation,
    ExperimentSpec,
    ForwardKl,
    FrozenWeights,
    InlineSource,
    ModelSpec,
    OptimizerSpec,
    RolloutSpec,
    Table,
    TeacherSpec,
    TrainingSpec,
    TransformersBackend,
    UserTurn,
    VocabularySupport,
)


@pytest.fixture(scope="session")
def process_group():
    """DeepSpeed's process group of one, for the whole session."""
    from sdkit.engine import zero

    zero.start()
    yield
    zero.stop()


def rows(count=6):
    return tuple(
        Table(
            {
                "prompt": f"What is {i} + {i}?",
                "demonstration": f"{i} + {i} = {2 * i}",
                "answer": str(2 * i),
            }
        )
        for i in range(count)
    )


def make_spec(model, **changes):
    """A small run: forward KL to a frozen teacher that sees the demonstration."""
    model_spec = changes.pop("model", None) or ModelSpec(path=str(model), dtype="float32")
    parts = {
        "model": model_spec,
        "data": DataSpec(
            source=InlineSource(rows=rows()),
            columns=Table(
                {"prompt": "prompt", "demonstration": "demonstration", "answer": "answer"}
            ),
        ),
        "rollout": RolloutSpec(max_new_tokens=8, backend=TransformersBackend()),
        "teacher": TeacherSpec(
            weights=FrozenWeights(),
            sees=UserTurn(
                template="{prompt}\nExample: {demonstration}",
                slots=Table({"demonstration": ColumnSlot(name="demonstration")}),
            ),
        ),
        "losses": Table(
            {"distil": Distillation(divergence=ForwardKl(), support=VocabularySupport())}
        ),
        "optimizer": OptimizerSpec(lr=1e-3),
        "training": TrainingSpec(steps=3, prompts_per_step=4, zero_stage=0),
    }
    return ExperimentSpec(**(parts | changes))


@pytest.fixture
def open_tiny(tiny_folder, process_group, tmp_path):
    """Open a world from changes to the small run; closed at the end of the test."""
    from sdkit.engine.run import open_world

    worlds = []

    def opened(**changes):
        worlds.append(open_world(make_spec(tiny_folder, **changes), tmp_path))
        return worlds[-1]

    yield opened
    for world in worlds:
        world.close()
