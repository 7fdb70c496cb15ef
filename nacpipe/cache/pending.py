"""What Zarr's event loop still has to do when the process ends.

A read that fails leaves its sibling chunks' reads running, and so does Ctrl-C; Zarr stops its loop whatever is still in
it, and asyncio then writes of every task that was destroyed. They are cancelled before, while the loop still runs:
nobody waits for them, and the error that mattered was raised long ago.
"""

from __future__ import annotations

import asyncio

from zarr.core.sync import loop, sync

PATIENCE = 1.0  # seconds; cancelled tasks take none


def end_pending() -> None:
    """Cancel what is left, and wait until it has ended."""
    if loop[0] is not None and loop[0].is_running():
        sync(_end_all())


async def _end_all() -> None:
    if others := asyncio.all_tasks() - {asyncio.current_task()}:
        for task in others:
            task.cancel()
        await asyncio.wait(others, timeout=PATIENCE)
