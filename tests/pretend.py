"""A device that is pretended: its tensors compute on the CPU, but say that they are elsewhere, and refuse what a GPU would refuse.

Inside `Pretend()`, tensors made with `device=DEVICE` belong to it. An operation on tensors of it and of the CPU together is an error (numbers of no dimension
excepted, as with CUDA), and whatever has to wait for the device to read a number is counted in `waits`."""

import traceback

import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("lazy", 0)  # a device type that torch knows, loads nothing for, and takes gradients on in the thread that asks for them
_aten = torch.ops.aten
_WAITING = {_aten._local_scalar_dense.default, _aten.is_nonzero.default, _aten.equal.default, _aten.nonzero.default, _aten.masked_select.default}
_INDEXING = {_aten.index_put_.default, _aten.index_put.default, _aten.index.Tensor}


class There(torch.Tensor):
    "A tensor of the pretended device; `held` is the one that computes"

    @staticmethod
    def __new__(cls, held):
        new = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, device=DEVICE, requires_grad=False
        )
        new.held = held
        return new

    device = property(lambda self: DEVICE)
    is_cpu = property(lambda self: False)

    @property
    def data(self):
        return torch.Tensor.data.__get__(self)

    @data.setter
    def data(self, new):
        torch.Tensor.data.__set__(self, new)
        self.held = new.held

    def data_ptr(self):
        return self.held.data_ptr()

    def untyped_storage(self):
        return self.held.untyped_storage()

    def to(self, *args, **kwargs):
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        if device is not None and device.type == "cpu":  # torch takes the tensor for one of the CPU, and would return it as it is
            Pretend.wait()
            return self.detach().held.to(dtype or self.dtype, copy=True)
        return self if dtype in (None, self.dtype) else super().to(dtype)

    def cpu(self):
        return self.to("cpu")

    def tolist(self):
        return self.cpu().tolist()

    def numpy(self):
        raise TypeError(f"can't convert {DEVICE} device type tensor to numpy")

    def __repr__(self):
        return f"There({self.held!r})"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _perform(function, args, kwargs or {})


class Generator(torch.Generator):
    "A generator that may be one of the device"

    def __new__(cls, device="cpu"):
        return super().__new__(cls, "cpu" if torch.device(device) == DEVICE else device)


class Pretend(TorchDispatchMode):
    "A context in which the pretended device is there"

    present = None

    def __init__(self):
        super().__init__()
        self.waits = []  # what waited for the device, as lines of code

    @classmethod
    def wait(cls):
        "Note that the device was waited for"
        if cls.present is not None:
            cls.present.waits.append("".join(traceback.format_stack(limit=14)[:-2]))

    @classmethod
    def forget(cls):
        "Forget what was waited for so far"
        if cls.present is not None:
            cls.present.waits.clear()

    def __enter__(self):
        Pretend.present = self
        return super().__enter__()

    def __exit__(self, *error):
        Pretend.present = None
        return super().__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return _perform(function, args, kwargs or {})


def _perform(function, args, kwargs):
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
    there = [x for x in tensors if isinstance(x, There)]
    asked = kwargs.get("device")
    copying = function in (_aten._to_copy.default, _aten.copy_.default)
    here = [x for x in tensors if not isinstance(x, There) and x.dim()]
    indexing = function in _INDEXING and isinstance(args[0], There)  # the places may be named by tensors of the CPU
    if there and here and not copying and not indexing:
        raise RuntimeError(f"Expected all tensors to be on the same device: {function} was given some on {DEVICE} and some on the cpu")
    if there and (function in _WAITING or copying and _leaves(function, args, asked)):
        Pretend.wait()
    if asked is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    result = function(*tree_map(_held, args), **tree_map(_held, kwargs))
    elsewhere = asked.type == DEVICE.type if asked is not None else bool(there)
    if function is _aten.copy_.default:
        elsewhere = isinstance(args[0], There)
    if not elsewhere:
        return result
    wrapped = tree_map(lambda x: There(x) if isinstance(x, torch.Tensor) else x, result)
    return return_and_correct_aliasing(function, args, kwargs, wrapped)


def _held(x):
    return x.held if isinstance(x, There) else x


def _leaves(function, args, asked):
    "Whether a copy brings numbers from the device to the CPU"
    if function is _aten.copy_.default:
        return isinstance(args[1], There) and not isinstance(args[0], There)
    return asked is not None and asked.type == "cpu" and isinstance(args[0], There)


def moved(value):
    "`value`, a tensor of the CPU, on the device"
    return There(value.detach().clone())


def moved_module(module):
    "`module` with its parameters and buffers on the device"
    for part in module.modules():
        for name, p in part._parameters.items():
            if p is not None:
                part._parameters[name] = torch.nn.Parameter(moved(p), p.requires_grad)
        for name, b in part._buffers.items():
            if b is not None:
                part._buffers[name] = moved(b)
    return module
