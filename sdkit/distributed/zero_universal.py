"""DeepSpeed's files of a checkpoint, rewritten for any number of ranks.  Reads pickles: only ever those of a run's own directory.

Its own converter does it, one parameter at a time: what was dealt out to the ranks is put together under zero/NAME/ as
fp32.pt, exp_avg.pt and exp_avg_sq.pt, and each rank takes its part when it loads them (`Zero.load`).
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
    """The student and its optimizer out of the folder of a checkpoint (ZeRO 1-3, after its first update) into another beside it.

    Raises OSError or RuntimeError where the disk is full.
    """
    prepare()
    with quiet(), contextlib.redirect_stderr(sys.stdout):
        from deepspeed.checkpoint import ds_to_universal

        # It makes a regular expression of the path to its output, so nobody's own folder names may stand in it.
        with contextlib.chdir(source.parent):
            ds_to_universal.main(
                argparse.Namespace(
                    input_folder=source.name,
                    output_folder=target.name,
                    num_extract_workers=1,
                    num_merge_workers=1,
                    keep_temp_folder=False,
                    strict=True,
                    inject_missing_state=True,  # stages 1-2 note no tensor parallelism: there is none
                )
            )
    (target.parent / "latest_universal").unlink()
    _prune(target / "zero")


def shapes(folder: Path) -> dict[str, torch.Size]:
    """The shapes of the trained parameters of a checkpoint under stage 3, by their names in the model."""
    held = _read(folder / "zero_pp_rank_0_mp_rank_00_model_states.pt")["param_shapes"]
    return {n.removeprefix("model."): shape for group in held for n, shape in group.items()}


def _prune(folder: Path) -> None:
    """Leave out what no rank reads: parameters that are not trained, and under stage 3 the first rank's part of the optimizer."""
    for parameter in [path for path in folder.iterdir() if path.is_dir()]:
        if not (parameter / "exp_avg.pt").is_file():
            shutil.rmtree(parameter)
    common = folder / "optimizer_state.pt"
    held = _read(common)
    if held.pop("fp32_flat_groups", None) is not None:
        optimizer = held["optimizer_state_dict"]
        optimizer["state"] = {0: {"step": optimizer["state"][0]["step"]}}
        torch.save(held, common)


def _read(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=False)
