"""Requests run on threads without an executor of Python, whose lock other code may hold for ever."""

import asyncio
import concurrent.futures.thread
import threading

import pytest

from musicgen_svc.runtime.request_threads import RequestThreads


def test_the_loop_gets_results_and_errors_of_what_runs_on_a_thread() -> None:
    async def main() -> None:
        threads = RequestThreads(1)
        _, name = threads.submit(lambda: threading.current_thread().name)
        assert await name == "request-0"
        _, failed = threads.submit(lambda: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            await failed

    asyncio.run(main())
    with pytest.raises(ZeroDivisionError):
        RequestThreads(1).run(lambda: 1 // 0)


def test_the_loop_continues_while_the_lock_of_all_executors_is_held() -> None:
    """On Python 3.11, Cog's own threads may hold it for ever."""

    async def main() -> None:
        with concurrent.futures.thread._global_shutdown_lock:
            _, outcome = threads.submit(lambda: "done")
            assert await outcome == "done"

    threads = RequestThreads(1)
    asyncio.run(main())


def test_a_job_can_be_withdrawn_only_before_a_thread_begins_it() -> None:
    async def main() -> None:
        threads, ran = RequestThreads(1), []
        hold, held = threading.Event(), threading.Event()

        def block() -> None:
            held.set()
            hold.wait()

        first, ended = threads.submit(block)
        second, _ = threads.submit(lambda: ran.append("second"))
        third, last = threads.submit(lambda: ran.append("third"))
        held.wait()
        assert not first.withdraw()
        assert second.withdraw()
        hold.set()
        await ended
        await last
        assert ran == ["third"]
        assert not third.withdraw()

    asyncio.run(main())
