"""Memory of a training step, found by running it on tensors without data.

`trace_memory` runs the real step (objective, backward pass, optimizer) on tensors that have a shape, a dtype and a device and
no data (torch's `FakeTensor`), and follows which of them are alive. So no formula of activations has to agree with the code:
what autograd saves, what a kernel keeps and what is freed early is what happens. Tokens, labels and masks are real, since
shapes depend on them: the LM head runs only at the labels.

Native kernels are not called; they allocate nothing. Scratch buffers inside a matrix product are not seen. On a CPU the heap is larger
than its tensors (`firth.training.heap`), and in bf16 the code that oneDNN compiles for each shape of a product lies in it.
"""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.weak import WeakIdKeyDictionary

from firth import kernel_choice
from firth.data.collate import counted_fields
from firth.model import attention, native
from firth.model.recurrent import lstm_runs_in_bf16
from firth.training.device import KEPT_MEMORY, casts, defers_reads
from firth.training.distributed import Parallel
from firth.training.heap import COMPILED_BYTES, IS_COMPILED, IS_NODE, IS_PRODUCT, IS_TENSOR, heap_bytes
from firth.training.optimizer import Optimizer, OptimizerConfig, untied_embeddings
from firth.training.step import step, to
from firth.types import IGNORE, Batch

if TYPE_CHECKING:
    from firth.data.source import Source
    from firth.model.model import LM
    from firth.objectives.objective import Objective

FACTORIES = frozenset({"empty", "empty_strided", "zeros", "ones", "rand", "randn", "full"})
"""Operators that make a tensor from a shape. Their floating-point tensors have no data in a trace."""

INDEXING = frozenset({"index", "index_put", "index_put_", "_index_put_impl_"})
"""Operators whose second argument may hold masks. The shape of the result depends on what they select."""

PRODUCTS = frozenset({"mm", "addmm", "bmm", "baddbmm", "linear", "matmul"})
"""Operators that multiply matrices. The last two are seen in inference mode only; else they are made of the others."""

RNN_POSITIONS = 16
"""Positions of a text on which a recurrent layer is run to learn what it keeps for each."""

MAX_KERNELS = 1024
"""For how many shapes of bf16 products oneDNN keeps the compiled code. Products of all kinds keep 554 to 609 kB a shape, as measured."""

MAX_READ_STEPS = 64
"""Most steps of a run for which new shapes of products are counted one by one."""

PROCESS_BYTES = 10_000_000
"""Resident bytes of a process on a CPU besides its heap: pages of libraries and further code that a step needs (measured: 5 to 17 MB)."""


@dataclass(frozen=True)
class StepMemory:
    """Bytes of a training step at its peak; the parts add up to `peak`, with `process`.

    Args:
        weights: Parameters and buffers.
        gradients: Gradients of parameters at that moment.
        optimizer: Momenta and second moments.
        activations: What is kept for the backward pass, and temporary tensors.
        free: On a CPU, free blocks of the heap between tensors, after `traced` steps.
        shapes: Different shapes of matrix products after each step of a run, as far as its batches were read.
        kernel: Bytes that the library keeps for each shape of a product.
        traced: Steps that were traced.
        process: Bytes that a process needs besides the heap.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    free: int = 0
    shapes: tuple[int, ...] = (0,)
    kernel: int = 0
    traced: int = 1
    process: int = 0

    @property
    def peak(self) -> int:
        """The most bytes at any time of a step."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.free + self.process

    def kernel_bytes(self, steps: int) -> int:
        """Return the bytes of the kernels that the library keeps in a run, one for each shape of a product.

        Shapes recur. After the last step that was read, each doubling of the steps adds as many as the last one.
        """
        known = len(self.shapes)
        shapes = float(self.shapes[min(steps, known) - 1])
        if steps > known:
            shapes += (self.shapes[-1] - self.shapes[(known - 1) // 2]) * math.log2(steps / known)
        return round(self.kernel * min(MAX_KERNELS, shapes))

    def peak_of_run(self, steps: int) -> int:
        """Return the most bytes in a run of some steps: with each kernel, which stays in a hole between tensors, holes grow."""
        grown = self.kernel_bytes(steps) / max(1, self.kernel_bytes(self.traced)) if self.kernel else 1.0
        return self.peak - self.free + round(self.free * grown) + self.kernel_bytes(steps)


class MemoryTrace(TorchDispatchMode):
    """Runs operators on floating-point tensors without data, and follows the bytes of all tensors.

    Args:
        device: The training device; only its tensors are counted.
    """

    def __init__(self, device: torch.device) -> None:
        from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode  # imports SymPy, which takes a second

        super().__init__()
        self.device, self._fake_type = device, FakeTensor
        self._fakes = FakeTensorMode(allow_non_fake_inputs=True)
        self._numbers: Any = WeakIdKeyDictionary()
        self.sizes: list[int] = []
        """Bytes of each storage, in the order of allocation."""
        self.events: list[int] = []
        """n + 1: storage n is allocated; -n - 1: it is freed."""
        self.sparse_tables: set[tuple[int, ...]] = set()
        """Shapes of embedding tables whose gradient has only the rows that were looked up."""
        self.products: set[tuple[Any, ...]] = set()
        """Shapes of the matrix products so far."""
        self.kinds: dict[int, int] = {}
        """Number -> kind of what is not a tensor (`firth.training.heap`)."""
        self.compiles = False
        """Whether code is compiled for each bf16 product of a new shape, and kept."""
        self.nodes: list[int] = []
        """Numbers of the nodes of the autograd graph since the last backward pass."""

    def number(self, x: Tensor, size: int | None = None) -> int:
        """Return the number of a tensor's storage; a new one is counted as allocated.

        Args:
            x: The tensor.
            size: Bytes of a new storage; None: those that the tensor has.
        """
        storage = x.untyped_storage()
        known: int | None = self._numbers.get(storage)
        if known is not None:
            return known
        number = len(self.sizes)
        counted = x.device.type == self.device.type
        self.sizes.append((storage.nbytes() if size is None else size) if counted else 0)
        self.events.append(number + 1)
        self._numbers[storage] = number
        weakref.finalize(storage, self.events.append, -number - 1).atexit = False
        return number

    def add(self, kind: int, size: int = 0) -> int:
        """Count an allocation that is not a tensor's and return its number."""
        self.sizes.append(size)
        self.events.append(len(self.sizes))
        self.kinds[len(self.sizes) - 1] = kind
        return len(self.sizes) - 1

    def free(self, numbers: Sequence[int]) -> None:
        """Count allocations as freed."""
        self.events.extend(-number - 1 for number in numbers)

    def numbers(self, tensors: Sequence[Tensor | None]) -> set[int]:
        """Return the numbers of the storages of some tensors."""
        return {self.number(x) for x in tensors if x is not None}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        tensors = [x for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)]
        fake = any(isinstance(x, self._fake_type) for x in tensors)
        if name == "_local_scalar_dense" and fake:  # is the norm above its limit, is everything finite: yes
            return 1.0 if args[0].dtype.is_floating_point else 1
        if not tensors and name in FACTORIES:
            fake = _dtype(name, args, kwargs).is_floating_point
        if fake:
            if name in INDEXING:
                args = self._by_position(args)
            with self._fakes:
                out = func(*args, **kwargs)
        else:
            out = func(*args, **kwargs)
        size = None
        if fake and name == "mkldnn_rnn_layer" and out[3] is not None:
            self.number(out[3], rnn_workspace(*args))
        if name == "embedding_dense_backward" and tuple(out.shape) in self.sparse_tables:
            size = args[1].numel() * out.shape[-1] * out.element_size()
        for x in tree_iter(out):
            if isinstance(x, Tensor):
                self.number(x, size)
        if fake and name in PRODUCTS and tensors[0].dtype == torch.bfloat16:
            scalars = tuple(x for x in tree_iter((args, kwargs)) if isinstance(x, int | float))
            self._count_product((name, scalars, *((tuple(x.shape), tuple(x.stride())) for x in tensors)))
        if fake and torch.is_grad_enabled() and name != "prim::device" and any(x.requires_grad for x in tensors):
            self.nodes.append(self.add(IS_NODE))
        return out

    def _count_product(self, product: tuple[Any, ...]) -> None:
        """Count a bf16 product by its shapes and factors, and allocate the code for a new one."""
        new = product not in self.products
        self.products.add(product)
        if self.compiles:
            needed = self.add(IS_PRODUCT)
            if new:
                self.add(IS_COMPILED, COMPILED_BYTES)
            self.free([needed])

    def _by_position(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return the arguments of an indexing operator with masks that have data replaced by the positions they select."""

        def positions(x: Tensor | None) -> Sequence[Tensor | None]:
            known = x is not None and x.dtype == torch.bool and not isinstance(x, self._fake_type)
            return x.nonzero().unbind(-1) if known and x is not None else (x,)

        return (args[0], [each for x in args[1] for each in positions(x)], *args[2:])

    def peak(self, parts: Sequence[set[int]]) -> tuple[int, list[int]]:
        """Return the most live bytes, and how many of them are in each of several sets of storages."""
        live = most = 0
        alive: set[int] = set()
        at: set[int] = set()
        for event in self.events:
            number = abs(event) - 1
            if event < 0:
                live -= self.sizes[number]
                alive.discard(number)
                continue
            live += self.sizes[number]
            alive.add(number)
            if live > most:
                most, at = live, set(alive)
        return most, [sum(self.sizes[n] for n in part & at) for part in parts]


def rnn_workspace(x: Tensor, *args: Any) -> int:
    """Return the bytes that oneDNN's recurrent layer keeps for its backward pass, which a tensor without data does not have.

    They grow by the same number with each position. So the layer is run on zeros, on two short texts.

    Args:
        x: The input of `aten::mkldnn_rnn_layer`: positions, rows, width, whatever its `batch_first` says.
        args: Its further arguments.
    """
    weights, rest = [torch.zeros(w.shape, dtype=w.dtype) for w in args[:6]], args[6:]
    length = x.shape[0]

    def kept(positions: int) -> int:
        out = torch.ops.aten.mkldnn_rnn_layer(torch.zeros(positions, *x.shape[1:], dtype=x.dtype), *weights, *rest)
        return 0 if out[3] is None else int(out[3].untyped_storage().nbytes())

    short = min(length, RNN_POSITIONS)
    return kept(short) if short == length else kept(short) + (kept(2 * short) - kept(short)) * (length - short) // short


def _dtype(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.dtype:
    """Return the dtype of what a factory makes."""
    given: torch.dtype | None = kwargs.get("dtype")
    if given is None and name == "full":
        return torch.float32 if isinstance(args[1], float) else torch.int64
    return given or torch.get_default_dtype()


@contextmanager
def memory_trace(device: torch.device) -> Iterator[MemoryTrace]:
    """Run torch's operators without data within the block.

    Which kernels run is measured before, on tensors with data, since some keep more than others for the backward pass.
    """
    kernel_choice.table()
    attention.flash_runs(torch.bfloat16)
    lstm_runs_in_bf16()
    trace = MemoryTrace(device)
    with warnings.catch_warnings(), native.without_computation(), trace:
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        yield trace


class _Traced(Parallel):
    """Counts the nodes of the autograd graph as freed when the loss is: it holds them all until after the backward pass."""

    def __init__(self, trace: MemoryTrace) -> None:
        self.trace = trace

    def backward(self, loss: Tensor, last: bool) -> None:
        weakref.finalize(loss, self.trace.free, self.trace.nodes).atexit = False
        self.trace.nodes = []
        super().backward(loss, last)


def variety(objective: Objective, batches: Sequence[Batch]) -> frozenset[tuple[Any, ...]]:
    """Return what the shapes of products depend on in a step: the shapes of its fields, and its numbers of labels."""
    counted = set(counted_fields(objective).values())
    return frozenset(
        [(name, *x.shape) for batch in batches for name, x in batch.items()]
        + [(name, int((batch[name] != IGNORE).sum())) for batch in batches for name in counted if name in batch]
    )


def _varieties(steps: Sequence[frozenset[Any]]) -> list[int]:
    """Return how many different values there are up to each step."""
    seen: set[Any] = set()
    counts = []
    for values in steps:
        seen |= values
        counts.append(len(seen))
    return counts


def trace_step(
    trace: MemoryTrace,
    model: LM,
    objective: Objective,
    optimizer: OptimizerConfig,
    steps: Sequence[Sequence[Batch]],
    precision: Literal["fp32", "bf16"],
    dropout: bool,
    source: Source | None = None,
    run: Sequence[frozenset[Any]] = (),
) -> StepMemory:
    """Return the memory of a training step, the last of several: the first has no optimizer state yet.

    A rollout batch of an on-policy source runs before each. Its prompts are read once to be answered and once with their answers, so
    it has twice the new shapes of the passes that are traced.

    Args:
        trace: The active trace, in which the model was built.
        model: The model.
        objective: The objective.
        optimizer: The optimizer.
        steps: The micro-batches of each step, with data.
        precision: Precision of the forward and backward pass.
        dropout: Whether the step uses dropout.
        source: The source of the batches.
        run: The `variety` of the first steps of a run; new shapes of products come with new values.
    """
    model.train(dropout)
    trace.compiles = trace.device.type == "cpu" and precision == "bf16"
    trace.sparse_tables = {tuple(table.weight.shape) for table in untied_embeddings(model)}
    deferred = defers_reads(trace.device)
    skip = torch.zeros((), device=trace.device) if deferred else None
    updates = Optimizer(optimizer, model, deferred=deferred)
    weights = trace.numbers([*model.parameters(), *model.buffers()])
    gradients: set[int] = set()
    shapes, of_rollouts = [], []
    for number, batches in enumerate(steps):
        before = len(trace.products)
        if source is not None and source.on_policy:
            with casts(precision, trace.device)():
                source.rehearse_rollout(model, number)
        of_rollouts.append(len(trace.products) - before)
        placed = [to(batch, trace.device) | {"step": torch.tensor(number)} for batch in batches]
        step(model, objective, placed, precision=casts(precision, trace.device), parallel=_Traced(trace))
        gradients |= trace.numbers([p.grad for p in updates.parameters])
        updates.clip_grad_norm()
        updates.step(1.0, skip)
        shapes.append(len(trace.products))
    kernels = {number for number, kind in trace.kinds.items() if kind == IS_COMPILED}
    state = trace.numbers(list(updates.state().values())) - weights
    most, (in_weights, in_gradients, in_state, in_kernels) = trace.peak((weights, gradients, state, kernels))
    rest = most - in_weights - in_gradients - in_state - in_kernels
    free = 0
    if trace.device.type == "cpu":
        heap = heap_bytes(
            trace.sizes, trace.events, KEPT_MEMORY, [trace.kinds.get(n, IS_TENSOR) for n in range(len(trace.sizes))]
        )
        free = max(0, (heap or most) - most)
    added = shapes[-1] - shapes[0]
    if run:
        values, seen = _varieties(run), _varieties([variety(objective, batches) for batches in steps])
        of_run = [shapes[0] + round(added * (n - values[0]) / max(1, seen[-1] - seen[0])) for n in values]
    else:
        sampling = sum(of_rollouts[1:])
        added += round(2 * sampling / source.steps_per_rollout) - sampling if source is not None else 0
        of_run = [shapes[0] + added * n // max(1, len(shapes) - 1) for n in range(MAX_READ_STEPS)]
    kernel = COMPILED_BYTES if trace.compiles else 0
    process = PROCESS_BYTES if trace.device.type == "cpu" else 0
    return StepMemory(
        in_weights, in_gradients, in_state, rest, free, tuple(of_run), kernel, traced=len(steps), process=process
    )
