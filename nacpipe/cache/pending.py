"""Cancelling the tasks in Zarr's event loop when the process ends.

After a failed read or Ctrl-C, concurrent reads of other chunks are still running. Zarr stops its loop at exit, and
asyncio then prints a message for every unfinished task. They are cancelled before that; their results are not needed.
"""

from __future__ import annotations

import asyncio

from zarr.core.sync import loop, sync

TIMEOUT = 1.0  # seconds; cancelled tasks end at once


def cancel_pending_tasks() -> None:
    """Cancel the pending tasks and wait until they have ended."""
    if loop[0] is not None and loop[0].is_running():
        sync(_cancel_all())


async def _cancel_all() -> None:
    if others := asyncio.all_tasks() - {asyncio.current_task()}:
        for task in others:
            task.cancel()
        await asyncio.wait(others, timeout=TIMEOUT)
