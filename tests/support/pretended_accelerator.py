"""A pretended accelerator: its tensors hold real values, refuse to meet host tensors, and count what makes the host wait.

torch's own FakeTensorMode with device="cuda" has no values for `.item()`, and a CPU build of torch has no guard for CUDA
devices, so autograd aborts.  Here PrivateUse1 is a backend in Python: a wrapper subclass holds each tensor on the host,
and a dispatch mode checks every operator as CUDA would.  Import it in a process of its own: the backend is registered for
good.  DeepSpeed imports a module named `accelerator`: this file must not have that name.
"""

import collections
import contextlib
import sys

import torch
from deepspeed.accelerator import cpu_accelerator
from deepspeed.accelerator import real_accelerator as accelerator
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "pretended"
_setup_privateuseone_for_python_backend(NAME)
DEVICE = torch.device(NAME, 0)
HOST = torch.device("cpu")
aten = torch.ops.aten

COPIES = {aten._to_copy.default, aten.copy_.default}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
JOINING = {aten.cat.default, aten.stack.default}
SIZED_BY_VALUES = {
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.unique_consecutive.default,
    aten.bincount.default,
    aten.repeat_interleave.Tensor,
}
"""Operators whose result has a size that depends on values: the host waits for it."""

waits = collections.Counter()
"""How often the host waited for the device since `clear`, by (kind, file:line of the caller)."""


class DeviceMixing(RuntimeError):
    """An operator got tensors of the host and of the accelerator."""


class DeviceTensor(torch.Tensor):
    """A tensor on the pretended accelerator; `held` has its values."""

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
        )

    def __init__(self, held):
        self.held = held.detach()

    def __repr__(self):
        return f"DeviceTensor({tuple(self.shape)}, {self.dtype})"

    def tolist(self):
        return self.cpu().tolist()

    def untyped_storage(self):
        return self.held.untyped_storage()

    def data_ptr(self):
        return self.held.data_ptr()

    def numpy(self, **_):
        raise DeviceMixing("numpy() of an accelerator's tensor")

    def __deepcopy__(self, memo):
        copied = DeviceTensor(self.held.clone())
        if isinstance(self, torch.nn.Parameter):
            copied = torch.nn.Parameter(copied, requires_grad=self.requires_grad)
        memo[id(self)] = copied
        return copied

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return dispatch(func, args, kwargs or {})


def dispatch(func, args, kwargs):
    """Runs the operator on the held values; raises DeviceMixing where CUDA would refuse the devices."""
    own, hosts = [], []
    held = [_held(x, own, hosts) for x in args]
    given = {name: _held(x, own, hosts) for name, x in kwargs.items() if name != "pin_memory"}
    wanted = kwargs.get("device")
    if wanted is not None:
        given["device"] = HOST
    if own:
        # CUDA takes a number from the host as an operand, but not as a part of another tensor.
        _check(func, args, hosts if func in JOINING else [x for x in hosts if x.dim() > 0])
    result = func(*held, **given)
    if func is aten.copy_.default:
        if isinstance(args[0], DeviceTensor) != isinstance(args[1], DeviceTensor):
            _count("to the host" if own[0] is args[1] else "to the device")
        return args[0]
    here = bool(own) if wanted is None else torch.device(wanted).type == NAME
    if func is aten._to_copy.default and here != bool(own):
        _count("to the device" if here else "to the host")
    if not here:
        return result
    if own and func._schema.is_mutable:
        return return_and_correct_aliasing(func, args, kwargs, _wrapped(result))
    return _wrapped(result)


def _held(value, own, hosts):
    """Returns the value with the held tensors in place of the accelerator's; lists the tensors of both sides."""
    if isinstance(value, DeviceTensor):
        own.append(value)
        return value.held
    if isinstance(value, torch.Tensor):
        hosts.append(value)
        return value
    if isinstance(value, list | tuple):
        return type(value)(_held(x, own, hosts) for x in value)
    return value


def _wrapped(value):
    if isinstance(value, torch.Tensor):
        return DeviceTensor(value)
    return type(value)(_wrapped(x) for x in value) if isinstance(value, list | tuple) else value


def _check(func, args, hosts):
    if hosts and func not in COPIES:
        if func not in INDEXING or not isinstance(args[0], DeviceTensor):
            shapes = [tuple(x.shape) for x in hosts]
            raise DeviceMixing(f"{func}: expected all tensors on one device, found {NAME} and cpu {shapes}")
        _count("index on the host")  # CUDA allows it, by a hidden transfer
    if func is aten._local_scalar_dense.default:
        _count("to the host")
    if func in SIZED_BY_VALUES or (func in INDEXING and any(_is_mask(x) for x in args[1])):
        _count("size of a result")


def _is_mask(index):
    return index is not None and index.dtype in (torch.bool, torch.uint8)


def _count(kind):
    waits[kind, _caller()] += 1


def _caller():
    """Returns file:line of the innermost frame of sdkit, of the innermost one outside torch if there is none."""
    frame, outside = sys._getframe(1), None
    while frame:
        name = frame.f_code.co_filename
        if "/sdkit/" in name and "/tests/" not in name:
            return f"sdkit/{name.split('/sdkit/')[-1]}:{frame.f_lineno}"
        if outside is None and "/torch/" not in name and not name.endswith("accelerator.py"):
            outside = f"{name.rsplit('/', 1)[-1]}:{frame.f_lineno}"
        frame = frame.f_back
    return outside or "?"


class Dispatch(TorchDispatchMode):
    """Sends every operator to `dispatch`, so that new tensors are made on the right device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return dispatch(func, args, kwargs or {})


class Constructors(TorchFunctionMode):
    """Makes `torch.tensor(…, device=…)` on the host and sends it: it copies inside C++, past every dispatch mode."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            if torch.device(kwargs["device"]).type == NAME:
                del kwargs["device"]
                return func(*args, **kwargs).to(DEVICE)
        return func(*args, **kwargs)


def choose():
    """Makes the pretended accelerator the device of this process's rank."""
    for name, module in list(sys.modules.items()):
        if name.startswith("sdkit.") and hasattr(module, "rank_device"):
            module.rank_device = lambda: DEVICE


def move(module):
    """Moves a module's parameters and buffers to the accelerator; shared ones stay shared.  Returns the module."""
    moved = {}
    for part in module.modules():
        for table in (part._parameters, part._buffers):
            for name, tensor in table.items():
                if tensor is None or isinstance(tensor, DeviceTensor):
                    continue
                if id(tensor) not in moved:
                    new = DeviceTensor(tensor.detach())
                    if isinstance(tensor, torch.nn.Parameter):
                        new = torch.nn.Parameter(new, requires_grad=tensor.requires_grad)
                    moved[id(tensor)] = new
                table[name] = moved[id(tensor)]
    return module


class DeepSpeedAccelerator(cpu_accelerator.CPU_Accelerator):
    """DeepSpeed's view of the device."""

    def device_name(self, device_index=None):
        return str(DEVICE)

    def current_device_name(self):
        return str(DEVICE)


@contextlib.contextmanager
def pretended():
    """Inside the block the pretended accelerator exists, and models are moved to it."""
    to = torch.nn.Module.to

    def move_or_stay(self, *args, **kwargs):
        target = args[0] if args else kwargs.get("device")
        if isinstance(target, str | torch.device) and torch.device(target).type == NAME:
            return move(self)
        return to(self, *args, **kwargs)

    torch.nn.Module.to = move_or_stay
    own = accelerator.get_accelerator()
    accelerator.set_accelerator(DeepSpeedAccelerator())
    try:
        with Constructors(), Dispatch():
            yield
    finally:
        torch.nn.Module.to = to
        accelerator.set_accelerator(own)
