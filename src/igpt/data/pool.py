"""Run jobs in several processes: ordered results, few jobs in flight, and a clean end of all."""

import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from multiprocessing import current_process, get_context, parent_process, resource_tracker
from threading import Lock, Thread, current_thread, main_thread
from typing import Any, TypeVar

from igpt.errors import InputError

Job = TypeVar("Job")
Result = TypeVar("Result")


@contextmanager
def running(
    work: Callable[[Job], Result], workers: int
) -> Iterator[Callable[[Iterable[Job]], Iterator[Result]]]:
    """Yield a function that runs jobs, in this process or in spawned workers.

    Workers receive `work` once, and jobs one by one, which are taken from their iterable as needed.
    Workers do not import the main script, so that it needs no `if __name__ == "__main__"`; the
    classes of `work` and of the jobs must therefore come from modules.

    Raises:
        InputError: a worker was killed.
    """
    if workers == 1:
        yield lambda jobs: map(work, jobs)
        return
    if current_process().daemon:
        raise InputError("a daemonic process cannot start workers; use workers=1 in it")
    pool = ProcessPoolExecutor(
        workers, get_context("spawn"), initializer=_start_worker, initargs=(work,)
    )

    def submit(job: Job) -> Future[Any]:
        # Any call of `pool.submit` may start a worker.
        with _deferred_signals(), _hidden_main():
            try:
                return pool.submit(_run_in_worker, job)
            except BrokenPipeError:
                # The worker was killed before it had read `work`.
                raise BrokenProcessPool from None

    def run(jobs: Iterable[Job]) -> Iterator[Result]:
        remaining = iter(jobs)
        waiting = deque(submit(job) for job in islice(remaining, 2 * workers))
        while waiting:
            result = waiting.popleft().result()
            waiting.extend(submit(job) for job in islice(remaining, 1))
            yield result

    try:
        yield run
    except BrokenProcessPool:
        raise InputError(
            "a worker was killed, most often for lack of memory; the same command with fewer "
            "workers resumes from here"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_main_lock = Lock()  # all threads share `__main__`
_work: Callable[[Any], Any] | None = None  # set once in each worker process


def _start_worker(work: Callable[[Any], Any]) -> None:
    global _work
    _work = work
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # Otherwise the workers of a killed parent would wait for their next job forever.
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _run_in_worker(job: Any) -> Any:
    assert _work is not None
    return _work(job)


@contextmanager
def _deferred_signals() -> Iterator[None]:
    """Defer Ctrl-C and SIGTERM to the end of the block; processes started in it ignore Ctrl-C.

    An interrupted start of a worker would print a traceback. Ctrl-C is sent to all processes of a
    terminal; only this one handles it, and ends its workers.
    """
    # Started inside of the block, the resource tracker would unblock SIGINT.
    resource_tracker.ensure_running()
    arrived = list[int]()
    handled = [signal.SIGINT, signal.SIGTERM] if current_thread() is main_thread() else []
    before = {
        number: signal.getsignal(number) for number in handled if callable(signal.getsignal(number))
    }
    for number in before:
        signal.signal(number, lambda received, _: arrived.append(received))
    # New processes inherit the mask.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if arrived:
            signal.raise_signal(arrived[0])


@contextmanager
def _hidden_main() -> Iterator[None]:
    """Keep processes that are started in the block from importing the main module.

    `multiprocessing.spawn.get_preparation_data` sends the name and the file of `__main__` to a new
    process, which imports it. A script without `if __name__ == "__main__"` would then run again in
    every worker.
    """
    with _main_lock:
        main = vars(sys.modules["__main__"])
        names = ["__spec__", "__file__"]
        before = {name: main[name] for name in names if name in main}  # notebooks have no file
        main.update(__spec__=None, __file__=None)
        try:
            yield
        finally:
            del main["__file__"]
            main.update(before)
