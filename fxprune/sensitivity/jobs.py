"""Tasks on an existing engine: joblib runs them here, in local processes, on Dask or on Ray."""

import os
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import closing

import joblib
from joblib.parallel import get_active_backend
from torch import fx

from fxprune.errors import EvaluationError
from fxprune.sensitivity.damage import Scale
from fxprune.sensitivity.grid import Task
from fxprune.sensitivity.transport import Packed
from fxprune.sensitivity.worker import Outcome, run_packed, run_task

_PATIENCE = 3  # rounds that end in a lost worker without one finished task


class Jobs:
    """Runs tasks, each with what it needs to be run anywhere.

    Args:
        model: the captured model.
        evaluate: what measures it.
        n_jobs: how many tasks at a time; None: what ``joblib.parallel_config`` says, else one per
            core. With 1, tasks run in this process unless another backend is chosen.
        threads: how many threads each may use for its arithmetic.
    """

    def __init__(
        self,
        model: fx.GraphModule,
        evaluate: Callable[..., float],
        n_jobs: int | None,
        threads: int,
    ) -> None:
        self.model, self.evaluate, self.threads = model, evaluate, threads
        backend, configured = get_active_backend()
        engine = type(backend).__name__
        if n_jobs is None:
            n_jobs = configured
        if n_jobs is None:
            n_jobs = _cores(model, threads) if engine == "LokyBackend" else -1
        self.n_jobs = n_jobs
        here = engine == "SequentialBackend" or (engine == "LokyBackend" and n_jobs == 1)
        self.packed = None if here else Packed(model, evaluate)

    def run(self, tasks: Sequence[Task], scale: Scale) -> Generator[Outcome]:
        """Outcomes in the order in which they come.

        A lost worker costs the tasks that it was busy with; they are run again.

        Raises:
            EvaluationError: workers are lost again and again.
        """
        if self.packed is None:
            for k, task in enumerate(tasks):
                yield from run_task(self.model, self.evaluate, k, task, scale, self.threads)
            return
        left = dict(enumerate(tasks))
        losses = 0
        while left:
            try:
                with closing(self._round(self.packed, left, scale)) as outcomes:
                    for outcome in outcomes:
                        left.pop(outcome.task, None)
                        losses = 0
                        yield outcome
            # Every engine has its own errors for lost workers; a task itself raises none.
            except Exception as error:
                losses += 1
                if losses == _PATIENCE:
                    names = ", ".join(t.group or "the whole model" for t in [*left.values()][:3])
                    raise EvaluationError(
                        f"workers were lost {_PATIENCE} times in a row, with {len(left)} tasks "
                        f"left ({names}): {type(error).__name__}: {error}"
                    ) from error

    def _round(self, packed: Packed, left: dict[int, Task], scale: Scale) -> Generator[Outcome]:
        calls = [
            joblib.delayed(run_packed)(packed.data, packed.digest, k, task, scale, self.threads)
            for k, task in left.items()
        ]
        try:
            parallel = joblib.Parallel(
                n_jobs=self.n_jobs,
                return_as="generator_unordered",
                batch_size=1,
                pre_dispatch="2*n_jobs",
            )
            outcomes = parallel(calls)
            try:
                # Delegating would close it before the filter below is there.
                for outcome in outcomes:  # noqa: UP028
                    yield outcome
            finally:
                with warnings.catch_warnings():  # joblib warns of tasks that an error cancels
                    warnings.simplefilter("ignore", UserWarning)
                    outcomes.close()
        except ValueError as error:
            if "return_as" not in str(error):
                raise
            # This engine hands results over when all are there: give it a few tasks at a time.
            with joblib.Parallel(n_jobs=self.n_jobs, batch_size=1) as parallel:
                step = max(joblib.effective_n_jobs(self.n_jobs), 1)
                for k in range(0, len(calls), step):
                    yield from parallel(calls[k : k + step])


def _cores(model: fx.GraphModule, threads: int) -> int:
    """How many tasks fit this machine: one per core; one on an accelerator, which they share."""
    if any(t.device.type != "cpu" for t in model.state_dict().values()):
        return 1
    return max((os.cpu_count() or 1) // threads, 1)
