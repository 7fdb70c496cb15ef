"""A classifier behind an endpoint that says which images not to trust it on: images that wait are scored as one batch.

uvicorn endpoint:app          curl --data-binary @photo.png http://127.0.0.1:8000/classify
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import torch
from fastapi import FastAPI, HTTPException, Request
from safetensors.torch import load_file
from torch import Tensor

import nacpipe
from nacpipe.networks.architectures.digits_cnn import DigitsCNN

LARGEST, WAIT = 32, 0.005  # images in a batch; seconds that the first one waits for others

network = DigitsCNN()  # your own network, with the weights that were extracted
network.load_state_dict(load_file(Path("digits_cnn.safetensors")))
detector = nacpipe.load_detector("digits.detector.safetensors", network)
waiting: asyncio.Queue[tuple[Tensor, asyncio.Future[dict[str, object]]]] = asyncio.Queue(maxsize=4 * LARGEST)
sizes: list[int] = []  # of the batches, for whoever watches the endpoint


async def score_waiting() -> None:
    """Score what waits, a batch at a time; while one runs, in a thread, the next one gathers."""
    while True:
        batch = [await waiting.get()]
        await asyncio.sleep(WAIT)
        while len(batch) < LARGEST and not waiting.empty():
            batch.append(waiting.get_nowait())
        sizes.append(len(batch))
        try:
            found = await asyncio.to_thread(detector, torch.stack([image for image, _ in batch]))
        except Exception as error:  # these requests fail, the next ones are answered
            for _, answer in batch:
                answer.cancelled() or answer.set_exception(error)
            continue
        for row, (_, answer) in enumerate(batch):
            if not answer.cancelled():  # nobody waits for it any more
                answer.set_result(
                    {
                        "class": int(found.logits[row].argmax()),
                        "score": float(found.score[row]),
                        "percentile": float(found.percentile[row]),
                        "is_ood": bool(found.is_ood[row]),
                    }
                )


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    """Score while the application runs."""
    task = asyncio.create_task(score_waiting())
    yield
    task.cancel()


app = FastAPI(lifespan=lifespan)


@app.post("/classify")
async def classify(request: Request) -> dict[str, object]:
    """Answer with the class of an image and whether to trust it."""
    try:
        image = await asyncio.to_thread(detector.prepare_image, await request.body())
    except nacpipe.NacError as error:
        raise HTTPException(status_code=422, detail=error.one_line()) from None
    answer: asyncio.Future[dict[str, object]] = asyncio.get_running_loop().create_future()
    await waiting.put((image, answer))
    return await answer
