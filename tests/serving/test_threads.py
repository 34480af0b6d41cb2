import asyncio
import threading

import pytest

from acebert.serving.threads import to_its_end


def test_a_lock_is_held_until_the_thread_ends_however_often_its_task_is_cancelled() -> None:
    begun, end = threading.Event(), threading.Event()
    lock = asyncio.Lock()

    def work() -> int:
        begun.set()
        end.wait(60)
        return 1

    async def locked() -> int:
        async with lock:
            return await to_its_end(work)

    async def run() -> None:
        task = asyncio.create_task(locked())
        await asyncio.to_thread(begun.wait, 60)
        for _ in range(3):
            task.cancel()
            await asyncio.sleep(0.01)
        assert lock.locked()
        end.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not lock.locked()
        assert await locked() == 1

    asyncio.run(run())


def test_an_error_of_the_thread_is_raised() -> None:
    def work() -> None:
        raise ValueError("as it was")

    with pytest.raises(ValueError, match="as it was"):
        asyncio.run(to_its_end(work))
