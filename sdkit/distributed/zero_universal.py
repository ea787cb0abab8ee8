"""Converts DeepSpeed's checkpoint files to its universal format, for any number of ranks.

Reads pickles: use it only on a run's own directory.  DeepSpeed's converter merges the shards of one parameter at a time
into zero/NAME/fp32.pt, exp_avg.pt and exp_avg_sq.pt; each rank reads its shard when it loads them (`Zero.load`).
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from sdkit.distributed.zero import prepare, quiet


def rewrite(source: Path, target: Path) -> None:
    """Convert student and optimizer of a checkpoint (ZeRO 1-3, after its first update) into a sibling folder.

    Raises OSError or RuntimeError if the disk is full.
    """
    prepare()
    with quiet(), contextlib.redirect_stderr(sys.stdout):
        from deepspeed.checkpoint import ds_to_universal

        # It builds a regular expression from the output path, so the path must not contain arbitrary folder names.
        with contextlib.chdir(source.parent):
            ds_to_universal.main(
                argparse.Namespace(
                    input_folder=source.name,
                    output_folder=target.name,
                    num_extract_workers=1,
                    num_merge_workers=1,
                    keep_temp_folder=False,
                    strict=True,
                    inject_missing_state=True,  # stages 1-2 record no tensor parallelism; there is none
                )
            )
    (target.parent / "latest_universal").unlink()
    _prune(target / "zero")


def shapes(folder: Path) -> dict[str, torch.Size]:
    """Returns the shapes of the trained parameters of a stage 3 checkpoint, by their names in the model."""
    groups = _read(folder / "zero_pp_rank_0_mp_rank_00_model_states.pt")["param_shapes"]
    return {n.removeprefix("model."): shape for group in groups for n, shape in group.items()}


def _prune(folder: Path) -> None:
    """Remove what no rank reads: parameters that are not trained, and under stage 3 rank 0's optimizer shard."""
    for parameter in [path for path in folder.iterdir() if path.is_dir()]:
        if not (parameter / "exp_avg.pt").is_file():
            shutil.rmtree(parameter)
    common = folder / "optimizer_state.pt"
    state = _read(common)
    if state.pop("fp32_flat_groups", None) is not None:
        optimizer = state["optimizer_state_dict"]
        optimizer["state"] = {0: {"step": optimizer["state"][0]["step"]}}
        torch.save(state, common)


def _read(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=False)
