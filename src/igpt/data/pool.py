"""Work in several processes: results in order, little in flight, and an end whatever happens to any of them."""

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
    """How jobs are run: in this process, or by spawned ones, which are sent `work` once and then job by job.

    Jobs are taken from their iterable as they are needed. The workers do not import the script that
    was started, so that it needs no `if __name__ == "__main__"`: `work` and the jobs are of classes
    from modules.

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
        # Any call may start a worker.
        with _deferred_signals(), _hidden_main():
            try:
                return pool.submit(_run_in_worker, job)
            except BrokenPipeError:  # it was killed before it had read `work`
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
            "a worker was killed, most often for want of memory; the same command with fewer workers goes on from here"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_hiding = Lock()  # `__main__` belongs to all threads
_work: Callable[[Any], Any] | None = None  # of a worker process: sent once, not with every job


def _start_worker(work: Callable[[Any], Any]) -> None:
    global _work
    _work = work
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # Otherwise the workers of a killed parent wait for their next job for ever.
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _run_in_worker(job: Any) -> Any:
    assert _work is not None
    return _work(job)


@contextmanager
def _deferred_signals() -> Iterator[None]:
    """Handle Ctrl-C and SIGTERM only at the end of what is done in here; processes started in here never see Ctrl-C.

    A half-started worker would complain. Ctrl-C reaches all processes of a terminal: this one ends
    its workers.
    """
    resource_tracker.ensure_running()  # it would be started in here, and then unblock SIGINT
    arrived = list[int]()
    handled = [signal.SIGINT, signal.SIGTERM] if current_thread() is main_thread() else []
    before = {
        number: signal.getsignal(number) for number in handled if callable(signal.getsignal(number))
    }
    for number in before:
        signal.signal(number, lambda received, _: arrived.append(received))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # new processes inherit it
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
    """Keep processes that are started in here from importing the main module.

    `multiprocessing.spawn.get_preparation_data` sends the name and the file of `__main__` to a new
    process, which imports it. A script without `if __name__ == "__main__"` would start its work
    once more there.
    """
    with _hiding:
        main = vars(sys.modules["__main__"])
        names = ["__spec__", "__file__"]
        before = {name: main[name] for name in names if name in main}  # notebooks have no file
        main.update(__spec__=None, __file__=None)
        try:
            yield
        finally:
            del main["__file__"]
            main.update(before)
