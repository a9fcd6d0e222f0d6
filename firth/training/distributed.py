"""Distributed training: ranks, and detection of ranks that failed.

Data parallelism: sums over ranks, and synchronization.

The trainer divides by counts over all ranks, so a plain SUM of losses and gradients is correct, however the labels are
distributed over ranks. `join()` reads the environment variables that torchrun sets:

    torchrun --nproc-per-node 2 -m firth train gpt

Each rank has a copy of the model and takes the same step; data is split by global index (`firth.data.collate`). Ranks wait for
long work on a single rank without a collective, and a rank that fails or stops ends the others with an error that names it
(barriers and heartbeats, below).

Barriers, failure propagation and heartbeats between the ranks of a run, without collectives.

A collective is not suitable for long waits. It ends at the timeout of its process group (10 minutes for nccl, 30 for gloo),
and a rank inside it does not notice that another one has failed. Here the ranks use the key-value store of the process group:

    barrier    every rank increments a counter and polls it, for as long as it takes
    failures   a rank that raises writes its error into the store; the others end with the same error message
    heartbeat  a thread of each rank increments a counter of its own once a second. Rank 0 watches the counters of all ranks, the
               others watch rank 0: a rank whose counter does not change for SILENCE_SECONDS is stopped (SIGSTOP), killed or
               unreachable

The thread ends its process, because the main thread may be inside a collective that never returns. That is safe for
checkpoints: one that is being written does not have its final name yet (`firth.training.checkpoint`).

`Parallel` is what `firth.training.step` and the trainer ask for, in a single process or with a copy of the model on every rank: run
the forward pass, run the backward pass, sum the gradients over ranks. `Replicas` sums them in buckets while the last backward pass
of a step still runs: a bucket is sent as soon as its gradients are complete, in the same order on every rank. The sums are those of
one all-reduce after the backward pass: to the bit on two ranks, where a sum has two terms, and up to rounding on more.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import Literal, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore, Store

from firth.fields import NonNegativeInt, Validated
from firth.types import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process and its process group; a single process by default.

    Args:
        rank: The rank of this process.
        world: The number of ranks.
        device: Where its collectives run: a GPU for nccl, else the CPU.
        peers: The contact with the other ranks; None in a single process.
    """

    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")
    peers: PeerWatch | None = field(default=None, compare=False, repr=False)

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which writes files and reports progress."""
        return self.rank == 0

    def sum(self, x: Tensor) -> Tensor:
        """Sum `x` over all ranks in place and return it."""
        if self.world > 1:
            self.call(lambda: dist.all_reduce(x))
        return x

    def sum_numbers(self, *values: float) -> list[float]:
        """Return the sums over all ranks of numbers that the host has; no rank waits for its device."""
        return self.sum(torch.tensor(values, dtype=torch.float64)).tolist() if self.world > 1 else [*values]

    def begin_sum(self, x: Tensor) -> dist.Work:
        """Start to sum `x` over all ranks in place; `finish` waits for the result."""
        work: list[dist.Work] = []
        self.call(lambda: work.append(dist.all_reduce(x, async_op=True)))
        return work[0]

    def finish(self, work: dist.Work) -> None:
        """Wait for a collective that has been started."""
        self.call(work.wait)

    def copy_from_first(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite the tensors with those of rank 0."""
        if self.world > 1:
            for x in tensors:
                self.call(lambda x=x: dist.broadcast(x, 0))  # type: ignore[misc]

    def gather(self, x: Tensor) -> Tensor:
        """Stack `x` of every rank: (...) -> (world, ...)."""
        if self.world == 1:
            return x[None]
        out = [torch.empty_like(x) for _ in range(self.world)]
        self.call(lambda: dist.all_gather(out, x))
        return torch.stack(out)

    def gather_arrays(self, x: np.ndarray) -> list[np.ndarray]:
        """Return the one-dimensional array of every rank; their lengths may differ."""
        if self.world == 1:
            return [x]
        lengths = self.gather(torch.tensor([len(x)], device=self.device))[:, 0].tolist()
        if not max(lengths):
            return [x] * self.world
        padded = np.zeros(max(lengths), x.dtype)
        padded[: len(x)] = x
        rows = self.gather(torch.from_numpy(padded).to(self.device)).cpu().numpy()
        return [row[:length] for row, length in zip(rows, lengths, strict=True)]

    def errors(self, error: Exception | None) -> list[str]:
        """Return the message of the error of every rank, "" for one without an error. All ranks call this."""
        text = "" if error is None else str(error) or type(error).__name__
        return [bytes(row).decode() for row in self.gather_arrays(np.array([*text.encode()], np.uint8))]

    def dealt(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Return `function(x)`, which maps each of the K first entries of `x` by itself and keeps shape and dtype.

        Each rank computes an equal share of the entries, and all get the whole result.
        """
        if self.world == 1:
            return function(x)
        share = -(-len(x) // self.world)
        own = x[self.rank * share : (self.rank + 1) * share]
        out = x.new_zeros(share, *x.shape[1:])
        if len(own):
            out[: len(own)] = function(own)
        return self.gather(out).flatten(0, 1)[: len(x)]

    def wait(self) -> None:
        """Wait until every rank calls this, however long that takes.

        Raises:
            UserError: Another rank has failed.
        """
        if self.peers is not None:
            self.peers.wait()

    def first_rank_first(self, make: Callable[[], T]) -> T:
        """Return `make()`, called on the first rank, which writes files, and then on the others, which find them."""
        if not self.first:
            self.wait()
            return make()
        made = make()
        self.wait()
        return made

    def from_first(self, value: str) -> str:
        """Return rank 0's value on every rank."""
        return value if self.peers is None else self.peers.from_first(value)

    def together(self) -> AbstractContextManager[None]:
        """Return a context in which this rank ends with an error message if another one fails, stops or is killed."""
        return nullcontext() if self.peers is None else self.peers.together()

    def call(self, collective: Callable[[], T], only: bool = True) -> T:
        """Run a collective and return its result.

        Args:
            collective: The function.
            only: Whether it does nothing else. Otherwise an error that no other rank has caused is raised as it is.

        Raises:
            UserError: It failed; the message names the rank that caused it.
        """
        try:
            return collective()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if self.peers is None:
                raise
            cause = self.peers.explain()
            if not cause and not only:
                raise
            raise UserError(
                cause or f"the ranks lost contact ({str(error).splitlines()[0]}); {RESTART_HINT}"
            ) from error


@dataclass(frozen=True)
class DistributedConfig(Validated, section="distributed"):
    """How a model is spread over several processes. A resumed run may change it.

    Args:
        shard: "none" keeps a copy of the model on every process. "full" gives each process a part of every weight (FSDP2).
            "hybrid" does so within groups of processes, and keeps a copy in each group (HSDP). One process ignores it.
        shard_degree: With "hybrid", the processes of a group; 0: those of one machine.
    """

    shard: Literal["none", "full", "hybrid"] = "none"
    shard_degree: NonNegativeInt = 0

    def degree(self, ranks: Ranks) -> int:
        """Return how many ranks share one copy of the model; 1 without sharding.

        Raises:
            UserError: The ranks cannot be divided into such groups.
        """
        if self.shard == "none" or ranks.world == 1:
            return 1
        if self.shard == "full":
            return ranks.world
        degree = self.shard_degree or int(os.environ.get("LOCAL_WORLD_SIZE", ranks.world))
        if ranks.world % degree:
            raise UserError(
                f"distributed.shard_degree={degree} does not divide the {ranks.world} processes: set it to a divisor"
            )
        return degree


def join(device: torch.device | None = None) -> Ranks:
    """Join the process group of torchrun, or return a single rank without torchrun.

    Tensors on a CPU are exchanged by gloo, those on a GPU by nccl.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return Ranks()
    on_cuda = device is not None and device.type == "cuda"
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_cuda else "gloo")
    peers = _peers() if dist.get_world_size() > 1 else None
    where = device if device is not None and on_cuda else torch.device("cpu")
    return Ranks(dist.get_rank(), dist.get_world_size(), where, peers)


@cache
def _peers() -> PeerWatch:
    """Return this process's contact with the other ranks, which uses the store of the process group."""
    store = dist.distributed_c10d._get_default_store()
    return PeerWatch(store, dist.get_rank(), dist.get_world_size(), silence_seconds())


SILENCE_SECONDS = 120.0
"""A rank without a heartbeat for this long counts as stopped. It is this long because data preparation may hold the GIL;
the environment variable FIRTH_RANK_TIMEOUT overrides it."""

BEAT_SECONDS = 1.0
"""Most seconds between heartbeats; a tenth of the allowed silence if that is less."""

GRACE_SECONDS = 5.0
"""How long a rank's main thread has to end by itself after another rank has failed."""

POLL_SECONDS = 0.02
"""Seconds between two polls of the store while a rank waits."""


def silence_seconds() -> float:
    """Return the seconds without a heartbeat after which a rank counts as stopped.

    Raises:
        UserError: FIRTH_RANK_TIMEOUT is not a positive number.
    """
    text = os.environ.get("FIRTH_RANK_TIMEOUT", str(SILENCE_SECONDS))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise UserError(f"FIRTH_RANK_TIMEOUT={text} must be a number of seconds above 0")
    return seconds


class PeerWatch:
    """This rank's contact with the others.

    Args:
        store: The store of the process group.
        rank: This rank.
        world: The number of ranks.
        silence: Seconds without a heartbeat after which a rank counts as stopped.
    """

    def __init__(self, store: Store, rank: int, world: int, silence: float) -> None:
        self.rank, self.world, self.silence = rank, world, silence
        self.host = "torchrun" if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else "rank 0"
        self.interval = min(BEAT_SECONDS, silence / 10)
        # A client handles one call at a time, and that of the process group may block: each thread has its own.
        self._store, self._others = (PrefixStore("firth", store.clone()) for _ in range(2))  # type: ignore[attr-defined]
        self._waits = 0
        self._depth = 0
        self._last_reply = time.monotonic()
        self._closed = threading.Event()
        self._threads = [
            threading.Thread(target=work, daemon=True) for work in (self._send_heartbeats, self._watch_store)
        ]
        for thread in self._threads:
            thread.start()
        atexit.register(self.close)

    def close(self) -> None:
        """End the threads: a thread inside a call to the store at interpreter exit would abort the process."""
        self._closed.set()
        for thread in self._threads:
            thread.join(GRACE_SECONDS)

    def wait(self) -> None:
        """Wait until every rank calls this, however long that takes.

        Raises:
            UserError: Another rank has failed.
        """
        self._waits += 1
        self._count_in(f"wait/{self._waits}", wait=True)
        # Rank 0, whose process may host the store, leaves last: by then the others have seen that all ranks are here.
        self._count_in(f"seen/{self._waits}", wait=self.rank == 0)

    def _count_in(self, key: str, wait: bool) -> None:
        """Increment a counter, and optionally wait until all ranks have."""
        self._reach(lambda: self._store.add(key, 1))
        while wait and self._reach(lambda: self._store.add(key, 0)) < self.world:
            failure = self._reach(lambda: self._failure(self._store))
            if failure:
                raise UserError(failure)
            time.sleep(POLL_SECONDS)

    def from_first(self, value: str) -> str:
        """Return rank 0's value on every rank."""
        key = f"value/{self._waits}"
        if self.rank == 0:
            self._reach(lambda: self._store.set(key, value))
        self.wait()
        stored: bytes = self._reach(lambda: self._store.get(key))
        return stored.decode()

    @contextmanager
    def together(self) -> Iterator[None]:
        """Watch the other ranks in this context, and report an exception of this rank to them."""
        self._depth += 1
        try:
            yield
        except BaseException as error:
            if self._depth == 1:
                self._fail(str(error) or type(error).__name__)
            raise
        finally:
            self._depth -= 1

    def explain(self) -> str:
        """Return why a collective has failed: another rank's error, or the rank whose heartbeat has stopped; "" if neither."""
        before = self._counts()
        end = time.monotonic() + max(GRACE_SECONDS, 3 * self.interval)
        while time.monotonic() < end:
            try:
                failure = self._failure(self._store)
            except RuntimeError:
                return self._lost()
            if failure:
                return failure
            time.sleep(self.interval)
        after = self._counts()
        silent = [rank for rank in range(self.world) if rank != self.rank and before.get(rank) == after.get(rank)]
        return f"rank {silent[0]} has ended without an error of its own (killed?); {RESTART_HINT}" if silent else ""

    def _counts(self) -> dict[int, int]:
        """Return the heartbeat counters of all ranks; empty if the store cannot be reached."""
        try:
            return {rank: self._store.add(f"alive/{rank}", 0) for rank in range(self.world)}
        except RuntimeError:
            return {}

    def _reach(self, call: Callable[[], T]) -> T:
        """Call the store; raise a UserError if it cannot be reached."""
        try:
            return call()
        except RuntimeError as error:
            raise UserError(self._lost()) from error

    def _lost(self) -> str:
        return f"{self.host}, which hosts the store of the ranks, has ended or cannot be reached; {RESTART_HINT}"

    def _failure(self, store: Store) -> str:
        """Return the error message of another rank that has failed; empty if none has."""
        if not store.check(["failed"]):
            return ""
        number, _, message = store.get("failed").decode().partition(" ")
        return "" if int(number) == self.rank else message

    def _fail(self, message: str) -> None:
        """Report this rank's error, and wait until the others have read it: the store may end with this process."""
        try:
            self._store.compare_set("failed", "", f"{self.rank} rank {self.rank} failed: {message}")
            self._store.set(f"known/{self.rank}", "")
            end = time.monotonic() + GRACE_SECONDS
            while not self._store.check([f"known/{rank}" for rank in range(self.world)]) and time.monotonic() < end:
                time.sleep(POLL_SECONDS)
        except RuntimeError:  # the store has ended, which tells the others
            return

    def _send_heartbeats(self) -> None:
        """Send heartbeats, and watch those of other ranks and failures. Runs in a thread."""
        store = self._others
        watched = range(1, self.world) if self.rank == 0 else range(1)
        seen = {rank: (-1, time.monotonic()) for rank in watched}
        while True:
            began = time.monotonic()
            try:
                store.add(f"alive/{self.rank}", 1)
                self._last_reply = time.monotonic()
                failure = self._failure(store)
                for rank in watched:
                    count = store.add(f"alive/{rank}", 0)
                    if count != seen[rank][0] or not self._depth:
                        seen[rank] = count, time.monotonic()
                    elif time.monotonic() - seen[rank][1] > self.silence:
                        failure = failure or self._stopped(f"rank {rank}")
                        store.compare_set("failed", "", f"{rank} {failure}")
                if failure:
                    store.set(f"known/{self.rank}", "")
            except RuntimeError:
                if self._depth:
                    self._end(self._lost())
                return
            if failure and self._depth:
                self._end(failure)
            if self._closed.wait(self.interval):
                return
            if time.monotonic() - began > self.silence / 2:  # this process itself has been stopped
                seen = {rank: (count, time.monotonic()) for rank, (count, _) in seen.items()}

    def _watch_store(self) -> None:
        """End this process when the store does not reply: its host may be the stopped rank. Runs in a thread."""
        before = time.monotonic()
        while not self._closed.wait(self.interval):
            now = time.monotonic()
            if now - before > self.silence / 2 or not self._depth:  # this process itself has been stopped
                self._last_reply = now
            before = now
            if now - self._last_reply > self.silence + 2 * self.interval:
                self._end(self._stopped(self.host))

    def _stopped(self, who: str) -> str:
        return f"{who} has sent no heartbeat for {self.silence:g} s: it is stopped or cannot be reached; {RESTART_HINT}"

    def _end(self, failure: str) -> None:
        """End this process unless its main thread does so in time."""
        end = time.monotonic() + min(GRACE_SECONDS, self.silence)
        while time.monotonic() < end:
            if not self._depth:
                return
            time.sleep(POLL_SECONDS)
        sys.stdout.flush()
        print(f"firth: {failure}", file=sys.stderr, flush=True)
        os._exit(2)


RESTART_HINT = "start all ranks again, and the run resumes from its last checkpoint"
"""What to do when a rank is lost."""


BUCKET_BYTES = 32 << 20
"""Bytes of gradients that are summed in one call: large enough to saturate a link, small compared with the model."""


class Parallel:
    """A single process."""

    def forward(self, function: Callable[[], T]) -> T:
        """Return `function()`, which runs the model and computes the loss."""
        return function()

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradients of a loss to those of the parameters.

        Args:
            loss: The loss of a micro-batch on this rank.
            last: Whether it is the last of the step: the gradients are then summed over ranks.
        """
        torch.autograd.backward(loss)


class Replicas(Parallel):
    """A copy of the model on every rank.

    A parameter that no rank uses in a step keeps no gradient; one that another rank uses has a gradient of zeros here.

    Args:
        parameters: The trained parameters, in the same order on every rank.
        ranks: The process group.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], ranks: Ranks) -> None:
        self.ranks = ranks
        self.buckets = [list(bucket) for bucket in buckets(parameters[::-1])]  # the backward pass starts at the end
        self._missing: list[int] = []
        self._sent: list[dist.Work] = []
        self._used: list[bool] = []
        self._overlap = False
        for number, bucket in enumerate(self.buckets):
            for p in bucket:
                p.register_post_accumulate_grad_hook(self._hook(number))

    def _hook(self, number: int) -> Callable[[Tensor], None]:
        def complete(_: Tensor) -> None:
            if self._overlap:
                self._missing[number] -= 1
                while len(self._sent) < len(self.buckets) and not self._missing[len(self._sent)]:
                    self._send()

        return complete

    def backward(self, loss: Tensor, last: bool) -> None:
        self._missing = [len(bucket) for bucket in self.buckets]
        self._sent, self._used, self._overlap = [], [], last
        super().backward(loss, last)
        self._overlap = False
        if not last:
            return
        while len(self._sent) < len(self.buckets):
            self._send()
        for work in self._sent:
            self.ranks.finish(work)
        parameters = [p for bucket in self.buckets for p in bucket]
        for p, count in zip(parameters, self.ranks.sum_numbers(*self._used), strict=True):
            if not count:
                p.grad = None

    def _send(self) -> None:
        """Start to sum the next bucket. Its gradients become views of one tensor, which is summed in place."""
        bucket = self.buckets[len(self._sent)]
        self._used += [p.grad is not None for p in bucket]
        flat = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in bucket])
        for p, piece in zip(bucket, torch.split(flat, [p.numel() for p in bucket]), strict=True):
            p.grad = piece.view_as(p)
        self._sent.append(self.ranks.begin_sum(flat))


def buckets(tensors: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Yield consecutive tensors of one dtype, together at most BUCKET_BYTES (a larger tensor is alone)."""
    bucket: list[nn.Parameter] = []
    size = 0
    for x in tensors:
        if bucket and (size + x.nbytes > BUCKET_BYTES or x.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(x)
        size += x.nbytes
    if bucket:
        yield bucket
