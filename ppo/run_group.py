"""Several runs over one base in one process: they take turns, and one program samples for all.

Decoding a token is bound by reading the weights, so the responses of R runs cost little more than
those of one if a single program samples them (`Learner.rollout_of_runs`). All other programs of a
step are bound by computing; each run calls them by itself, and equal runs share the compiled ones.

Every run has a thread, and a lock lets one of them work at a time, so that memory holds the
activations of one run. A run that wants responses releases the lock. Once all runs that have not
ended want some, the last one samples for all of them. So runs that are resumed or evaluate at
different steps can be in one group, and a run that ends leaves the others as they are.

Before their first update, runs with one seed want the same responses, for their calibration, the
evaluation of step 0 and step 0. These are sampled once.
"""

import contextlib
import contextvars
import dataclasses
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from ppo.learner import Learner, RunPrompts
from sarm_jax.io.signals import STOP_SIGNALS, exit_after_cleanup, on_signal
from sarm_jax.sampling.generate import Generation

# Options that decide whether rollouts can be sampled by one program.
SHARED_OPTIONS = ("batch_size", "samples_per_prompt", "max_new_tokens", "temperature")


@dataclasses.dataclass
class _Request:
    """A rollout that a run waits for.

    `error` is the exception of the program that should have sampled it.
    """

    run: int
    learner: Learner
    params: dict
    base: nnx.State
    tokens_np: np.ndarray
    mask_np: np.ndarray
    key: jax.Array
    slots: int | None
    generation: Generation | None = None
    error: Exception | None = None

    @property
    def done(self) -> bool:
        """True once there is a result or an error."""
        return self.generation is not None or self.error is not None

    @property
    def program(self) -> tuple[Any, ...]:
        """A key; requests with equal keys are sampled by one program."""
        learner = self.learner
        if not learner.samples_runs_together:
            return (self.run,)
        options = [getattr(learner.config, name) for name in SHARED_OPTIONS]
        shapes = self.tokens_np.shape, self.slots is None
        graphs = learner.graphdef, learner.stops, learner.pad, learner.placement
        weights = tuple(id(x) for x in jax.tree.leaves(self.base))
        return (*options, *shapes, *graphs, weights)

    def has_responses_of(self, other: "_Request") -> bool:
        """Returns whether a request with the same `program` is for the same responses."""
        own, others = self._drawn_from, other._drawn_from
        return self.slots == other.slots and all(map(np.array_equal, own, others))

    @property
    def _drawn_from(self) -> Iterator[Any]:
        """Yields all arrays that decide the responses; those that differ most often come first."""
        yield jax.random.key_data(self.key)
        yield self.tokens_np
        yield self.mask_np
        yield from jax.tree.leaves(self.params["lora"])


class RunGroup:
    """Several runs that take turns, and the rollouts that they wait for."""

    def __init__(self) -> None:
        self._turn = threading.Condition()
        self._active = 0
        self._requests: list[_Request] = []
        self._signal = 0  # 0: none
        self._handlers: list[Callable[[int], None]] = []
        self._outer: dict[int, Any] = {}  # handlers of signals that were there before

    def run(self, functions: Sequence[Callable[["Member"], None]]) -> list[BaseException | None]:
        """Calls every function in a thread of its own, with its place in the group.

        Call it in the main thread, which passes signals to all runs.

        Returns:
            For each function the exception that ended it, or None.
        """
        errors: list[BaseException | None] = [None] * len(functions)

        def call(number: int) -> None:
            with self._turn:
                try:
                    functions[number](Member(self, number))
                except BaseException as error:
                    errors[number] = error
                finally:
                    self._active -= 1
                    self._sample_if_all_wait()

        self._active = len(functions)
        self._outer = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        threads = [threading.Thread(target=call, args=(n,)) for n in range(len(functions))]
        with on_signal(self._pass_signal):
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        return errors

    def rollout(self, request: _Request) -> Generation:
        """Lets other runs work until the request has been sampled together with theirs."""
        self._requests.append(request)
        self._sample_if_all_wait()
        self._turn.wait_for(lambda: request.done)
        if request.error is not None:
            raise request.error
        assert request.generation is not None
        return request.generation

    @contextlib.contextmanager
    def passing_signals_to(self, handler: Callable[[int], None]) -> Iterator[None]:
        """Calls `handler` with the number of the first signal, also if that came before."""
        self._handlers.append(handler)
        try:
            if self._signal:
                handler(self._signal)
            yield
        finally:
            self._handlers.remove(handler)

    def _pass_signal(self, number: int) -> None:
        """Passes a signal to the runs that have begun; before the first has, the process ends."""
        if not self._handlers:
            if callable(outer := self._outer.get(number)):
                outer(number, None)
            exit_after_cleanup(128 + number)
        self._signal = number
        for handler in list(self._handlers):
            handler(number)

    def _sample_if_all_wait(self) -> None:
        """Samples for all runs once each run that has not ended waits."""
        if not self._requests or len(self._requests) < self._active:
            return
        by_program: dict[tuple[Any, ...], list[_Request]] = {}
        for request in sorted(self._requests, key=lambda request: request.run):
            by_program.setdefault(request.program, []).append(request)
        self._requests = []
        for requests in by_program.values():
            try:
                for request, generation in zip(requests, _generations(requests), strict=True):
                    request.generation = generation
            except Exception as error:
                for request in requests:
                    request.error = error
        self._turn.notify_all()


@dataclasses.dataclass(frozen=True)
class Member:
    """The place of run number `number` in a group."""

    group: RunGroup
    number: int

    def rollout(
        self,
        learner: Learner,
        params: dict,
        base: nnx.State,
        tokens_np: np.ndarray,
        mask_np: np.ndarray,
        *,
        key: jax.Array,
        slots: int | None,
    ) -> Generation:
        """Samples like `Learner.rollout`, together with the other runs of the group."""
        request = _Request(
            run=self.number,
            learner=learner,
            params=params,
            base=base,
            tokens_np=tokens_np,
            mask_np=mask_np,
            key=key,
            slots=slots,
        )
        return self.group.rollout(request)

    @contextlib.contextmanager
    def on_signal(self, handler: Callable[[int], None]) -> Iterator[None]:
        """Calls `handler` with the number of the first signal that the process receives.

        It is called in the main thread, but with the context of this one, whose messages have the
        name of the run.
        """
        context = contextvars.copy_context()
        with self.group.passing_signals_to(lambda number: context.run(handler, number)):
            yield


def _generations(requests: Sequence[_Request]) -> list[Generation]:
    """Returns the responses of runs whose `program` is the same.

    They are sampled once if they are the same for all runs. If they are so for some of the runs,
    they are not, because each number of runs needs a program of its own.
    """
    first = requests[0]
    if all(first.has_responses_of(other) for other in requests[1:]):
        return _sample(requests[:1]) * len(requests)
    return _sample(requests)


def _sample(requests: Sequence[_Request]) -> list[Generation]:
    """Samples responses for each of the requests, whose `program` is the same."""
    first = requests[0]
    slots = None
    if first.slots is not None:  # a larger number gives the same results
        slots = max(request.slots for request in requests if request.slots is not None)
    if len(requests) == 1:
        generation = first.learner.rollout(
            first.params, first.base, first.tokens_np, first.mask_np, first.key, slots=first.slots
        )
        return [generation]
    runs = [
        RunPrompts(request.params["lora"], request.tokens_np, request.mask_np, request.key)
        for request in requests
    ]
    return first.learner.rollout_of_runs(runs, first.base, slots)
