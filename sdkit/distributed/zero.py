"""The wrapper around DeepSpeed: initialize, backward, step, fp32 master weights, save, load.  Knows no teacher and no loss."""

from __future__ import annotations

import atexit
import functools
import gc
import logging
import os
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from attrs import frozen
from torch import Tensor, nn

from sdkit.distributed import health, zero_shards
from sdkit.distributed.collectives import barrier, rank, world_size
from sdkit.language.specs import OptimizerSpec, TrainingSpec
from sdkit.models.device import rank_device
from sdkit.stdout import quiet

NO_DECAY_PATTERNS = (r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)")
"""Name patterns of biases and norms, from transformers' `Trainer.get_decay_parameter_names`."""


@frozen(kw_only=True)
class ZeroOptions:
    """What ZeRO offloads to CPU memory, and how ranks exchange gradients and weights."""

    offload: Sequence[str] = ()
    reduce_dtype: str = "float32"
    reduce_bucket_size: int = 500_000_000
    allgather_bucket_size: int = 500_000_000

    @classmethod
    def of(cls, training: TrainingSpec) -> ZeroOptions:
        return cls(
            offload=training.offload,
            reduce_dtype=training.reduce_dtype,
            reduce_bucket_size=training.reduce_bucket_size,
            allgather_bucket_size=training.allgather_bucket_size,
        )


@frozen(kw_only=True)
class OptimizerStepResult:
    """The result of an optimizer step."""

    applied: bool  # False if a gradient was not finite and the step was skipped
    grad_norm: float


def prepare() -> None:
    """Set the environment variables that DeepSpeed reads on its first import, which another library may trigger."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")


@functools.cache
def _freeze_imported_objects() -> None:
    """Exclude imported objects from garbage collection, once per process.

    DeepSpeed collects garbage four times during initialization, over half a million objects that live on.
    """
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # native bindings check for leaked objects at exit


def start(deadline_seconds: float = 600.0) -> None:
    """Join the process group, or create one with a single process.  Call before vLLM starts.

    `deadline_seconds` is the time limit of joining and of each collective operation.
    """
    prepare()
    with quiet():
        import deepspeed
        import deepspeed.ops

    _freeze_imported_objects()
    log = logging.getLogger("DeepSpeed")
    log.setLevel(logging.ERROR)
    log.handlers.clear()  # its handler writes to stdout; without one, logging falls back to stderr
    log.propagate = True
    # Otherwise its shared-memory collective is compiled at every start (33 s measured), and never used.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    timeout = timedelta(seconds=deadline_seconds)
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    device = rank_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not torch.distributed.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        if "WORLD_SIZE" not in os.environ:  # no launcher: a group of one needs no port
            os.environ.setdefault("LOCAL_RANK", "0")
            store = torch.distributed.HashStore()  # pyright: ignore[reportPrivateImportUsage]
            torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
        with quiet():
            deepspeed.init_distributed(backend, verbose=False, timeout=timeout)
    if world_size() != launched:
        raise RuntimeError(f"{launched} processes were launched, but {world_size()} joined")
    health.start()


def stop(*, together: bool = True) -> None:
    """Leave the process group; otherwise gloo may abort at exit.

    `together`: wait for all ranks first.  A rank that failed must not wait.
    """
    if torch.distributed.is_initialized():  # vLLM's engine leaves the group when it shuts down
        from deepspeed import comm

        if together:
            barrier()
            health.stop()
        else:
            health.fail()
        comm.destroy_process_group()  # torch's own function leaves DeepSpeed with a dead group, which breaks a second run
    # Until here it ends a rank that hangs.  A thread inside the store at the interpreter's end would abort the process.
    health.stop()


class Zero:
    """A DeepSpeed engine around a module whose forward pass returns (loss, anything).

    The loss must already be divided by global counts.  DeepSpeed averages gradients over ranks, so `backward`
    multiplies by the number of ranks.  Gradient accumulation is unmanaged, so nothing is divided by the number of
    micro-batches, which may differ between steps.
    """

    def __init__(
        self, module: nn.Module, optimizer: OptimizerSpec, stage: int, bf16: bool, options: ZeroOptions = ZeroOptions()
    ) -> None:
        import deepspeed

        if bf16 and stage == 0:
            raise ValueError("stage 0 in bfloat16 must run as stage 1, as the plan says")
        self.stage = stage
        self.named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
        groups: Any = parameter_groups(module, optimizer)
        self._decays: list[float] = [group["weight_decay"] for group in groups]
        with quiet():
            self.engine: Any = deepspeed.initialize(
                model=module, model_parameters=groups, config=_config(optimizer, stage, bf16, options)
            )[0]
        # Stage 0 all-reduces in `_unsharded_step`, which needs the gradient norm before the step.
        self.engine.enable_backward_allreduce = stage > 0
        self.skipped = self.engine.skipped_steps

    def forward(self, *args: Any) -> Any:
        return self.engine(*args)

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss * world_size())

    def step(self, lr: float) -> OptimizerStepResult:
        """Take one optimizer step on the accumulated gradients; skip it if a gradient is not finite."""
        for group in self.engine.basic_optimizer.param_groups:
            group["lr"] = lr
        if self.stage == 0:
            return self._unsharded_step()
        self.engine.step()
        skipped, self.skipped = self.engine.skipped_steps > self.skipped, self.engine.skipped_steps
        norm = self.engine.get_global_grad_norm()
        return OptimizerStepResult(applied=not skipped, grad_norm=float("inf") if norm is None else float(norm))

    def _unsharded_step(self) -> OptimizerStepResult:
        # Stage 0 in float32 is plain AdamW: DeepSpeed neither skips a step nor returns the norm.
        if world_size() > 1:
            self.engine.buffered_allreduce_fallback()
        norm = nn.utils.get_total_norm([p.grad for _, p in self.named if p.grad is not None])
        if not torch.isfinite(norm):
            self.engine.zero_grad()
            return OptimizerStepResult(applied=False, grad_norm=float("inf"))
        self.engine.step()
        return OptimizerStepResult(applied=True, grad_norm=norm.item())

    @property
    def shards_masters(self) -> bool:
        """Whether a rank has only a part of the masters."""
        return self.stage > 0 and world_size() > 1

    def masters(self) -> Iterator[tuple[str, Tensor]]:
        """Yields name and float32 value of every trained parameter; if ranks share the masters, this rank's shard, flat."""
        from deepspeed.utils import safe_get_local_fp32_param

        for name, parameter in self.named:
            value: Any = parameter.detach()
            if self.stage == 3:
                shard: Any = safe_get_local_fp32_param(parameter)
                value = zero_shards.unpadded(parameter, shard.flatten())
            elif self.stage > 0:
                fragment = _master_fragment(parameter)
                value = fragment.hp_fragment.detach() if fragment else parameter.new_empty(0, dtype=torch.float32)
                value = value if self.shards_masters else value.view_as(parameter)
            if value.dtype != torch.float32:
                raise RuntimeError(f"{name} has no float32 master")
            yield name, value

    def moments_to_come(self, device: torch.device) -> int:
        """Returns the bytes of this device that AdamW's moments will take: it allocates them in its first step."""
        optimizer = self.engine.basic_optimizer
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        return sum(2 * p.nbytes for p in parameters if p.device == device and not optimizer.state.get(p))

    def own_parts(self) -> dict[str, slice]:
        """Returns the part of each trained parameter, flattened, of which this rank has the masters (stages 1 and 2)."""
        parts: dict[str, slice] = {}
        for name, parameter in self.named:
            fragment = _master_fragment(parameter)
            address = fragment and fragment.lp_fragment_address
            parts[name] = slice(address.start, address.start + address.numel) if address else slice(0, 0)
        return parts

    def save(self, folder: Path, tag: str) -> None:
        """Write model and optimizer to folder/tag; every rank must call.  Raises OSError or RuntimeError."""
        with quiet():
            self.engine.save_checkpoint(str(folder), tag=tag, save_latest=False)
        if rank() == 0:
            for script in folder.glob("zero_to_*.py"):  # conversion scripts, which fail on tied weights
                script.unlink()

    def load(self, folder: Path, tag: str, *, universal: bool) -> None:
        """Load a checkpoint of this run.  `universal`: one that zero_universal.py wrote for another number of ranks.

        DeepSpeed's files are pickles: never load files from others.
        """
        # The effect of `checkpoint: {load_universal: …}`.  DeepSpeed reads it only here, and its value is known only now.
        self.engine._config.load_universal_checkpoint = universal
        with quiet():
            path, _ = self.engine.load_checkpoint(str(folder), tag=tag)
        if path is None:
            raise RuntimeError(f"DeepSpeed found no checkpoint {tag} in {folder}")
        if universal:
            # Under stage 3 all parts of a large optimizer get the same step tensor, and each would increment it.
            for state in self.engine.basic_optimizer.state.values():
                state["step"] = state["step"].clone()
            # Stage 3 gives every parameter group the settings of the first.
            groups = self.engine.basic_optimizer.param_groups
            for group, decay in zip(groups, self._decays, strict=True):
                group["weight_decay"] = decay
        self.skipped = self.engine.skipped_steps

    def close(self) -> None:
        self.engine.destroy()


def open_forward_only(root: zero_shards.Root, offload: Sequence[str]) -> Any:
    """Returns a DeepSpeed engine for a model that is not trained, sharded like the student (stage 3)."""
    import deepspeed

    bf16 = next(root.parameters()).dtype == torch.bfloat16
    with quiet():
        return deepspeed.initialize(
            model=root,
            config={
                "train_micro_batch_size_per_gpu": 1,
                "zero_optimization": zero_shards.settings(offload),
                "bf16": {"enabled": bf16},
                "steps_per_print": 10**9,
            },
        )[0]


def _master_fragment(parameter: Any) -> Any:
    """Returns where DeepSpeed has this rank's part of a parameter's master under stages 1 and 2; None if it has none."""
    return parameter._hp_mapping


def parameter_groups(module: nn.Module, optimizer: OptimizerSpec) -> list[dict[str, Any]]:
    """Returns the optimizer's parameter groups: trained parameters with and without weight decay.  No group is empty."""
    from transformers.pytorch_utils import ALL_LAYERNORM_LAYERS
    from transformers.trainer_pt_utils import get_parameter_names

    named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    if optimizer.decay == "all" or not optimizer.weight_decay:
        return [{"params": [p for _, p in named], "weight_decay": optimizer.weight_decay}]
    decayed = set(get_parameter_names(module, ALL_LAYERNORM_LAYERS, list(NO_DECAY_PATTERNS)))
    groups = [
        {"params": [p for n, p in named if n in decayed], "weight_decay": optimizer.weight_decay},
        {"params": [p for n, p in named if n not in decayed], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _config(optimizer: OptimizerSpec, stage: int, bf16: bool, options: ZeroOptions) -> dict[str, Any]:
    sharding: dict[str, Any] = zero_shards.settings(options.offload) if stage == 3 else {"stage": stage}
    sharding["reduce_bucket_size"] = options.reduce_bucket_size
    # DeepSpeed takes even numbers only.
    sharding["allgather_bucket_size"] = options.allgather_bucket_size + options.allgather_bucket_size % 2
    if "optimizer" in options.offload:
        sharding["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": optimizer.max_grad_norm,
        "zero_optimization": sharding,
        # DeepSpeed's default is the dtype of the forward pass.
        "communication_data_type": {"float32": "fp32", "bfloat16": "bf16"}[options.reduce_dtype],
        # The same AdamW with and without offload: DeepSpeed's own CPU optimizer is compiled at its first start.
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": bf16},
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": optimizer.lr,
                "betas": list(optimizer.betas),
                "eps": optimizer.eps,
                "weight_decay": optimizer.weight_decay,
                "torch_adam": True,
                "fused": True,
            },
        },
        "steps_per_print": 10**9,
    }
    if bf16:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config
