"""What a run leaves besides its results: modes of files, and texts and settings for TensorBoard."""

import os

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tinyruns import LORA, make_spec, model, teacher, train, training, with_evaluation

from sdkit.language.specs import EmaWeights, OutputSpec
from sdkit.runs.export import export


@pytest.fixture(scope="module")
def spec(tiny_folder):
    spec = make_spec(
        tiny_folder,
        model=model(tiny_folder, lora=LORA),
        teacher=teacher(EmaWeights(update_rate=0.3)),
        training=training(steps=2),
        output=OutputSpec(checkpoint_every=1, keep_best="score", samples_every=2),
    )
    return with_evaluation(spec, teacher_lift=0)


@pytest.fixture(scope="module")
def run(spec, tmp_path_factory):
    """A run with adapters, a moving teacher, a checkpoint and a best model, and its export, under an unusual umask."""
    folder = tmp_path_factory.mktemp("files")
    before = os.umask(0o027)
    try:
        train(spec, folder / "run")
        export(spec, folder, folder / "run", folder / "exported", merge=False)
    finally:
        os.umask(before)
    return folder / "run"


def test_modes_of_files_agree_with_the_umask(run):
    paths = [run, *run.rglob("*"), run.parent / "exported", *(run.parent / "exported").rglob("*")]
    modes = {str(path.relative_to(run.parent)): path.stat().st_mode & 0o777 for path in paths}
    tensors = [name for name in modes if name.endswith(".safetensors")]
    assert {"run/model/model.safetensors", "run/best/model/model.safetensors"} <= set(tensors)
    assert any("teacher" in name for name in tensors)
    assert any("exported" in name for name in tensors)
    wrong = {name: mode for name, mode in modes.items() if mode != (0o750 if (run.parent / name).is_dir() else 0o640)}
    assert wrong == {}


def test_tensorboard_has_texts_and_settings(run):
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    assert {f"{name}/text_summary" for name in ("resolved.yaml", "objective", "samples")} <= set(tags["tensors"])
    assert {"loss", "eval/score"} <= set(tags["scalars"])
    settings = b"".join(events.PluginTagToContent("hparams").values())
    assert b"optimizer.lr" in settings
    assert b"data.source" not in settings
