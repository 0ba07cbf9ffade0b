"""A CUDA device that is not there: what `pipeline.engine_cuda` asks of PyTorch and CuPy, done on the processor.

Everything is done at once, in the order in which it is queued, so that the numbers can be looked at. That a real
device might do it in another order is told by clocks: whoever waits learns what the other has done (Mattern,
"Virtual time and global states of distributed systems", 1989), and of two accesses to the same memory, one of them
a write, one must know of the other, or `Race` is raised. The same holds for memory that PyTorch's allocator may
give to another tensor of its stream.

What it does not see: how fast anything is; memory of the process that a copy reads while it is on its way, such as
a frame's; CuPy's work within a capture; and of threads only what all of them together know.
"""

from __future__ import annotations

import contextlib
import ctypes
import linecache
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import pipeline
from tests.pipeline.host_kernel import Dim

HOST = 0
"""The number under which the process itself is known among streams."""
_MADE_OF_OTHERS = torch._C.DispatchKey.CompositeImplicitAutograd
_COPIES = (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default)
"""What may take memory of the process and of the device."""
Stamp = tuple[int, int]
"""A stream and how many things it had done."""


class Race(AssertionError):
    """Two accesses to the same memory that a device may do in either order."""


class Mixed(AssertionError):
    """An operation on memory of the device and of the process."""


class CaptureBroken(AssertionError):
    """Something that ends a capture on a real device, or that it would miss."""


# Who has done what, and who knows of it.


@dataclass(eq=False)
class _Memory:
    """What was done to some memory since it was last written."""

    what: str
    size: int
    on_host: bool
    stream: int
    """Whose it is: the allocator gives it to another tensor of that stream when it is free."""
    written: Stamp = (HOST, 0)
    read: list[Stamp] = field(default_factory=list)


class _Thread(threading.local):
    """What is the case in a thread."""

    def __init__(self) -> None:
        self.streams: list[Stream] = []
        """PyTorch queues work on the last one."""
        self.borrowed: list[Stream] = []
        """CuPy does."""
        self.graph: Graph | None = None
        """What is captured."""
        self.recorded = False


class Device:
    """Streams, events, graphs and memory."""

    def __init__(self, kernels: dict[str, Callable[..., None]]) -> None:
        self.kernels = kernels
        self.done: dict[int, int] = {}
        """What the process knows to be over, by stream."""
        self.memory: dict[int, _Memory] = {}
        self.freed: list[_Memory] = []
        self.waits: set[str] = set()
        """Lines of code that wait for something."""
        self.left_out: str | None = None
        """Which of them does not."""
        self.compiler_fails = False
        self.changing = threading.RLock()
        self._streams = 0
        self.thread = _Thread()
        self.default = Stream(self)

    # What threads are about

    @property
    def current(self) -> Stream:
        """The stream that PyTorch queues work on, in this thread."""
        return self.thread.streams[-1] if self.thread.streams else self.default

    @property
    def current_of_cupy(self) -> Stream:
        """CuPy's."""
        return self.thread.borrowed[-1] if self.thread.borrowed else self.default

    @contextlib.contextmanager
    def on(self, stream: Stream, *, borrowed: bool = False) -> Iterator[None]:
        """Queue PyTorch's work of this thread on a stream, or CuPy's."""
        stack = self.thread.borrowed if borrowed else self.thread.streams
        stack.append(stream)
        with self.recording():
            try:
                yield
            finally:
                stack.pop()

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Look at what PyTorch does in this thread."""
        if self.thread.recorded:
            yield
            return
        self.thread.recorded = True
        try:
            with _Recorder(self):
                yield
        finally:
            self.thread.recorded = False

    def number(self) -> int:
        """Give a new stream its number."""
        self._streams += 1
        return self._streams

    # Waiting and doing

    def wait(self, line: str, knows: dict[int, int], others: dict[int, int]) -> None:
        """Learn what others have done, unless just this line is left out."""
        with self.changing:
            self.waits.add(line)
            if line != self.left_out:
                _learn(knows, others)

    def do(self, stream: Stream | None, what: str, reads: list[int], writes: list[int]) -> None:
        """Touch memory, by its addresses, on a stream or (None) in the process itself. Raises Race."""
        with self.changing:
            if stream is None:
                who, knows = HOST, self.done
            else:
                who, knows = stream.number, stream.knows
                _learn(knows, self.done)  # what is queued begins after what the process knew
            now = (who, knows.get(who, 0) + 1)
            knows[who] = now[1]
            for addresses, is_write in ((reads, False), (writes, True)):
                for memory in (self.memory[address] for address in dict.fromkeys(addresses)):
                    for before in (memory.written, *(memory.read if is_write else ())):
                        if knows.get(before[0], 0) < before[1]:
                            raise Race(
                                f"{what} on stream {who} does not wait for stream {before[0]}: {memory.what}"
                            )
                    if is_write:
                        memory.written, memory.read = now, []
                    else:
                        memory.read.append(now)

    def allocate(self, storage: torch.UntypedStorage, what: str, *, on_host: bool = False) -> int:
        """Know memory from now on until it is free. Raises Race."""
        with self.changing:
            address, stream = storage.data_ptr(), self.current
            if address in self.memory:
                return address
            if not on_host:
                for old in [old for old in self.freed if old.stream == stream.number]:
                    for before in (old.written, *old.read):
                        if max(stream.knows.get(before[0], 0), self.done.get(before[0], 0)) < before[1]:
                            raise Race(
                                f"{what} may get the memory of {old.what}, which stream {before[0]} still uses"
                            )
                    self.freed.remove(old)
            self.memory[address] = _Memory(what, storage.nbytes(), on_host, stream.number)
            weakref.finalize(storage, self._free, address)
            return address

    def _free(self, address: int) -> None:
        with self.changing:
            memory = self.memory.pop(address, None)
            if memory is not None and not memory.on_host:
                self.freed.append(memory)

    def forget(self) -> None:
        """Begin anew after a race: what it has left behind is no race of what follows."""
        with self.changing:
            self.memory.clear()
            self.freed.clear()


def _learn(knows: dict[int, int], others: dict[int, int]) -> None:
    for stream, count in others.items():
        knows[stream] = max(knows.get(stream, 0), count)


def _line() -> str:
    """Name the line that called whoever calls this."""
    code, number = sys._getframe(2).f_code, sys._getframe(2).f_lineno
    return f"{code.co_qualname}: {linecache.getline(code.co_filename, number).strip()}"


class Stream:
    """A torch.cuda.Stream."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.number = self.cuda_stream = self.ptr = device.number()
        self.knows: dict[int, int] = {}
        self.captured_by: Graph | None = None

    def synchronize(self) -> None:
        """Make the process wait."""
        if self.captured_by is not None:
            raise CaptureBroken("the process cannot wait for a stream that is captured")
        self.device.wait(_line(), self.device.done, self.knows)

    def wait_stream(self, other: Stream) -> None:
        """Make this stream wait for what another one was given so far."""
        line, graph = _line(), self.device.thread.graph
        if graph is not None:
            if other.captured_by is graph and line != self.device.left_out:
                self.captured_by = graph
            graph.steps.append(lambda as_: self.device.wait(line, as_(self).knows, as_(other).knows))
        self.device.wait(line, self.knows, other.knows)


class Event:
    """A torch.cuda.Event."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._recorded: dict[int, int] | None = None

    def record(self) -> None:
        """Mark a place in the current stream."""
        self._recorded = dict(self._device.current.knows)

    def elapsed_time(self, later: Event) -> float:
        """Return some time, ms; both must be over."""
        for recorded in (self._recorded, later._recorded):
            assert recorded is not None, "an event that was not recorded"
            assert all(self._device.done.get(stream, 0) >= count for stream, count in recorded.items())
        return 0.1


class Graph:
    """A torch.cuda.CUDAGraph: the steps that were captured, and their streams."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self.steps: list[Callable[[Callable[[Stream], Stream]], None]] = []
        self.streams: list[Stream] = []
        """The one that it is captured on, and those beside it."""
        self._replayed_on: dict[Stream, Stream] = {}
        """Those beside it are its own, whatever others do on those that it was captured on."""

    @contextlib.contextmanager
    def capture(self, stream: Stream, capture_error_mode: str) -> Iterator[None]:
        """Capture what this thread queues. Raises CaptureBroken."""
        assert capture_error_mode == "thread_local", "others go on meanwhile"
        device, self.streams = self._device, [stream]
        device.thread.graph, stream.captured_by = self, self
        try:
            with device.on(stream):
                yield
            for other in self.streams:
                if other.knows.get(other.number, 0) > stream.knows.get(other.number, 0):
                    raise CaptureBroken(f"stream {other.number} was not waited for at the end")
        finally:
            device.thread.graph = None
            for other in self.streams:
                other.captured_by = None
        self._replayed_on = {stream: stream}

    def took(self, stream: Stream) -> None:
        """Learn of a stream that takes part. Raises CaptureBroken."""
        if stream.captured_by is not self:
            raise CaptureBroken(f"work on stream {stream.number}, which waits for nothing captured")
        if stream not in self.streams:
            self.streams.append(stream)

    def replay(self) -> None:
        """Do it all again."""
        assert self._device.current is self.streams[0], "as it was captured, which other streams might not wait for"
        with torch.inference_mode():
            for step in self.steps:
                step(self._as_replayed)

    def _as_replayed(self, stream: Stream) -> Stream:
        if stream not in self._replayed_on:
            self._replayed_on[stream] = Stream(self._device)
        return self._replayed_on[stream]


class _Recorder(TorchDispatchMode):
    """Tells the device of all that PyTorch does with its memory in one thread."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self._device = device

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs, device = kwargs or {}, self._device
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        known = [t for t in tensors if _address(t) in device.memory]
        if not known:
            return func(*args, **kwargs)
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), _MADE_OF_OTHERS):
            with self:
                return func._op_dk(_MADE_OF_OTHERS, *args, **kwargs)
        aliases = [given.alias_info for given in func._schema.returns]
        if any(alias is not None and not alias.is_write for alias in aliases):
            return func(*args, **kwargs)  # a view touches nothing
        on_host = all(device.memory[_address(t)].on_host for t in known)
        if device.thread.graph is not None and (on_host or func is torch.ops.aten._local_scalar_dense.default):
            raise CaptureBroken(f"{func} has the process touch memory during a capture")
        if func not in _COPIES and any(t.dim() and _address(t) not in device.memory for t in tensors):
            raise Mixed(f"{func} takes memory of the process and of the device")
        found = func(*args, **kwargs)
        reads, writes = _touched(func, args, kwargs, device)
        if all(alias is None for alias in aliases):
            outputs = [t for t in tree_leaves(found) if isinstance(t, torch.Tensor)]
            writes += [device.allocate(t.untyped_storage(), str(func), on_host=on_host) for t in outputs]
        stream = None if on_host else device.current
        if stream is not None and (graph := device.thread.graph) is not None:
            graph.took(stream)
            graph.steps.append(lambda as_: _again(func, args, kwargs, found, device, as_(stream)))
            reads, writes = [], []  # that comes when it is replayed
        device.do(stream, str(func), reads, writes)
        return found


def _again(func, args, kwargs, found, device, stream) -> None:  # type: ignore[no-untyped-def]
    """Do a captured step once more, into the memory of the first time."""
    with torch.utils._python_dispatch._disable_current_modes():
        anew = func(*args, **kwargs)
        if all(given.alias_info is None for given in func._schema.returns):
            for old, new in zip(tree_leaves(found), tree_leaves(anew), strict=True):
                if isinstance(old, torch.Tensor):
                    old.copy_(new)
    reads, writes = _touched(func, args, kwargs, device)
    writes += [_address(t) for t in tree_leaves(found) if isinstance(t, torch.Tensor) and _address(t) not in writes]
    device.do(stream, f"{func}, replayed,", reads, writes)


def _touched(func, args, kwargs, device: Device) -> tuple[list[int], list[int]]:  # type: ignore[no-untyped-def]
    reads: list[int] = []
    writes: list[int] = []
    schema = func._schema.arguments
    for argument, value in [
        *zip(schema, args, strict=False),
        *((a, kwargs[a.name]) for a in schema if a.name in kwargs),
    ]:
        tensors = [t for t in tree_leaves(value) if isinstance(t, torch.Tensor) and _address(t) in device.memory]
        is_write = argument.alias_info is not None and argument.alias_info.is_write
        (writes if is_write else reads).extend(map(_address, tensors))
    return reads, writes


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class _Pinned(torch.Tensor):
    """Page-locked memory, which the process reads through NumPy."""

    device_of_it: Device

    def numpy(self, **_kwargs: object) -> np.ndarray:
        """Return the memory, read now."""
        self.device_of_it.do(None, "a look", [_address(self)], [])
        return self.as_subclass(torch.Tensor).numpy()


# CuPy


class Array:
    """A cupy.ndarray, as far as kernels and copies need one."""

    def __init__(self, device: Device, tensor: torch.Tensor) -> None:
        self.tensor, self.shape = tensor, tuple(tensor.shape)
        self.nbytes = tensor.nbytes
        self.data = types.SimpleNamespace(ptr=tensor.data_ptr())
        self.address = device.allocate(tensor.untyped_storage(), "an array of CuPy's")


def _fake_cupy(device: Device) -> types.ModuleType:
    cupy = types.ModuleType("cupy")

    def empty(shape: tuple[int, ...], dtype: np.dtype) -> Array:
        return Array(device, torch.from_numpy(np.empty(shape, dtype)))

    def asarray(values: np.ndarray) -> Array:
        made = Array(device, torch.from_numpy(values.copy()))
        device.do(device.current_of_cupy, "cupy.asarray", [], [made.address])
        return made

    def asnumpy(array: Array) -> np.ndarray:
        device.do(device.current_of_cupy, "cupy.asnumpy", [array.address], [])
        device.current_of_cupy.synchronize()
        return array.tensor.numpy()

    def copy_rows(
        to: int, to_pitch: int, source: int, pitch: int, width: int, rows: int, kind: int, stream: int
    ) -> None:
        assert kind == 1
        assert stream == device.current_of_cupy.number
        end = to + (rows - 1) * to_pitch + width
        with device.changing:
            (written,) = (a for a, memory in list(device.memory.items()) if a <= to and end <= a + memory.size)
        for row in range(rows):
            ctypes.memmove(to + row * to_pitch, source + row * pitch, width)
        device.do(device.current_of_cupy, "memcpy2DAsync", [], [written])

    class RawKernel:
        def __init__(self, source: str, name: str, options: tuple[str, ...]) -> None:
            assert name == "preprocess"
            self._run = device.kernels[source]

        def compile(self) -> None:
            """It is."""
            if device.compiler_fails:
                raise RuntimeError("Failed to find CUDA headers")

        def __call__(self, grid: tuple[int, int], block: tuple[int, int], arguments: tuple[object, ...]) -> None:
            arrays = [a for a in arguments if isinstance(a, Array)]
            self._run(Dim(*grid), Dim(*block), *map(_as_c, arguments))
            device.do(device.current_of_cupy, "the kernel", [a.address for a in arrays[:-1]], [arrays[-1].address])

    class ExternalStream:
        def __init__(self, pointer: int) -> None:
            self._pointer = pointer

        def __enter__(self) -> None:
            self._on = device.on(device.current, borrowed=True)
            assert device.current.number == self._pointer, "PyTorch's and CuPy's streams are not the same"
            self._on.__enter__()

        def __exit__(self, *exception: object) -> None:
            self._on.__exit__(*exception)

    cupy.empty, cupy.asarray, cupy.RawKernel, cupy.float32 = empty, asarray, RawKernel, np.float32
    cupy.zeros = lambda shape, dtype: asarray(np.zeros(shape, dtype))
    cupy.asnumpy, cupy.from_dlpack = asnumpy, lambda tensor: Array(device, tensor)
    cupy.get_default_memory_pool = lambda: types.SimpleNamespace(free_all_blocks=lambda: None)
    cupy.cuda = types.SimpleNamespace(
        ExternalStream=ExternalStream,
        get_current_stream=lambda: device.current_of_cupy,
        runtime=types.SimpleNamespace(memcpy2DAsync=copy_rows, memcpyHostToDevice=1),
    )
    return cupy


def _as_c(value: object) -> object:
    if isinstance(value, Array):
        return ctypes.c_void_p(value.data.ptr)
    if isinstance(value, np.uintp):
        return ctypes.c_void_p(int(value))
    return ctypes.c_float(value) if isinstance(value, np.floating) else ctypes.c_int(value)


# PyTorch


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch, host_kernels: dict[str, Callable[..., None]]) -> Iterator[Device]:
    """Put the device in the place of PyTorch's and CuPy's; `pipeline.engine_cuda` is to be imported after it."""
    device = Device(host_kernels)
    zeros, move = torch.zeros, torch.nn.Module.to

    def make_zeros(*shape: int, device: str | None = None, pin_memory: bool = False) -> torch.Tensor:
        made = zeros(*shape)
        if pin_memory:
            made = made.as_subclass(_Pinned)
            made.device_of_it = fake
        if device or pin_memory:
            address = fake.allocate(made.untyped_storage(), f"zeros{shape}", on_host=pin_memory)
            fake.do(None if pin_memory else fake.current, "torch.zeros", [], [address])
        return made

    def move_module(module: torch.nn.Module, *where: object, **how: object) -> torch.nn.Module:
        moved = move(module, *(each for each in where if each != "cuda"), **how)
        if "cuda" in where:
            for tensor in (*moved.parameters(), *moved.buffers()):
                address = fake.allocate(tensor.untyped_storage(), "the weights")
                fake.do(fake.current, "Module.to", [], [address])
        return moved

    fake = device
    cuda = {
        "Stream": lambda: Stream(device),
        "Event": lambda enable_timing: Event(device),
        "CUDAGraph": lambda: Graph(device),
        "graph": lambda graph, stream, capture_error_mode: graph.capture(stream, capture_error_mode),
        "stream": device.on,
        "current_stream": lambda: device.current,
        "get_device_name": lambda: "a CUDA device that is not there",
    }
    for name, value in cuda.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch, "zeros", make_zeros)
    monkeypatch.setattr(torch.nn.Module, "to", move_module)
    monkeypatch.setitem(sys.modules, "cupy", _fake_cupy(device))
    for modules, name in ((sys.modules, "pipeline.engine_cuda"), (vars(pipeline), "engine_cuda")):
        monkeypatch.setitem(modules, name, None)  # so that what is there now comes back
        del modules[name]
    with device.recording():
        yield device
