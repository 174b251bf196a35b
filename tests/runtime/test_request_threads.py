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


def test_jobs_that_follow_each_other_run_on_one_thread() -> None:
    """Libraries keep handles, workspaces and plans for each thread."""

    async def main() -> None:
        threads = RequestThreads(3)
        for _ in range(20):
            _, name = threads.submit(lambda: threading.current_thread().name)
            names.add(await name)

    names: set[str] = set()
    asyncio.run(main())
    assert len(names) == 1


def test_every_thread_is_used_and_every_job_is_run() -> None:
    async def main() -> None:
        threads, together = RequestThreads(3), threading.Barrier(3)
        held = [
            threads.submit(lambda: (together.wait(60), threading.current_thread().name)[1]) for _ in range(3)
        ]
        assert {await name for _, name in held} == {"request-0", "request-1", "request-2"}
        many = [threads.submit(lambda number=number: number)[1] for number in range(500)]
        assert await asyncio.gather(*many) == list(range(500))

    asyncio.run(main())
