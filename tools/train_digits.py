"""Train the network of the packaged benchmark `digits`; this script made the packaged weights.

    python tools/train_digits.py --output nacpipe/networks/architectures/digits_cnn.safetensors

The training images are main_train and sub_train (3,500 images). The number of epochs is fixed and the last epoch is
kept. No choice uses val or test; test is read once, at the end. The same seed gives the same weights on one machine
with one number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
import torch
from safetensors.torch import save_file
from torch.nn import functional

from nacpipe.benchmarks.digits import Images, Labels, load_set
from nacpipe.networks.architectures.digits_cnn import MEAN, STD, DigitsCNN

BATCH = 64  # images
PEAK_RATE = 1e-2  # AdamW's learning rate at the top of the one cycle
WEIGHT_DECAY = 1e-2
# Largest change of an augmented image, to either side.
TURN = math.radians(15)
SLANT = 0.2  # pixels sideways per pixel of height
ZOOM = 0.15  # share of the size
SHIFT = 2 / 14  # 2 pixels, in affine_grid's units of half an image


def new_network(seed: int) -> DigitsCNN:
    """Return an untrained network; torch's global random state is unchanged."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DigitsCNN()


def train(
    network: DigitsCNN,  # changed in place
    images: Images,  # (n, 28, 28)
    labels: Labels,  # (n,), 0..9
    *,
    seed: int,
    epochs: int,
) -> Iterator[float]:
    """Train a network, one epoch per item of the iterator; afterwards it is in evaluation mode.

    Yields:
        The epoch's mean cross-entropy per image, in nats, on the augmented images during training.
    """
    generator = torch.Generator().manual_seed(seed)
    inputs, targets = to_inputs(images), torch.tensor(labels)
    steps = math.ceil(len(images) / BATCH)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, epochs=epochs, steps_per_epoch=steps)
    for _ in range(epochs):
        network.train()
        total = 0.0
        for rows in torch.split(torch.randperm(len(images), generator=generator), BATCH):
            loss = functional.cross_entropy(network(augment(inputs[rows], generator)), targets[rows])
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
            total += loss.item() * len(rows)
        network.eval()
        yield total / len(images)


def augment(
    inputs: torch.Tensor,  # (n, 1, 28, 28), normalised
    generator: torch.Generator,
) -> torch.Tensor:  # (n, 1, 28, 28)
    """Rotate, slant, zoom and shift every image by its own random amounts; the borders are background."""
    turn, slant, zoom, right, down = 2 * torch.rand(5, len(inputs), generator=generator) - 1  # each (n,), -1..1
    turn, scale = turn * TURN, 1 + zoom * ZOOM
    cos, sin, slant = torch.cos(turn) * scale, torch.sin(turn) * scale, slant * SLANT
    # scale · rotation(turn) · [[1, slant], [0, 1]], and the shift as third column.
    first = torch.stack([cos, cos * slant - sin, right * SHIFT], dim=1)
    second = torch.stack([sin, sin * slant + cos, down * SHIFT], dim=1)
    theta = torch.stack([first, second], dim=1)  # (n, 2, 3)
    grid = functional.affine_grid(theta, list(inputs.shape), align_corners=False)
    # grid_sample fills with zeros, so the background is shifted to zero before and back after.
    background = -MEAN[0] / STD[0]
    return functional.grid_sample(inputs - background, grid, align_corners=False) + background


def to_inputs(images: Images) -> torch.Tensor:
    """Normalise grey images (n, 28, 28) for the network: float32 (n, 1, 28, 28)."""
    return ((torch.tensor(images, dtype=torch.float32) / 255 - MEAN[0]) / STD[0]).unsqueeze(1)


@torch.no_grad()
def accuracy(network: DigitsCNN, images: Images, labels: Labels) -> float:
    """Return the share, 0 to 1, of images (n, 28, 28) whose largest logit is their label's."""
    predictions = [network(part).argmax(dim=1) for part in torch.split(to_inputs(images), 500)]
    return float(np.mean(torch.cat(predictions).numpy() == labels))


@click.command()
@click.option("--seed", type=int, default=1, show_default=True, help="Initial weights, order and augmentation.")
@click.option("--epochs", type=click.IntRange(1), default=40, show_default=True, help="Passes over the 3,500 images.")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), required=True, help="The safetensors file.")
def main(seed: int, epochs: int, output: Path) -> None:
    """Train the digits network and print its accuracy on the test set.

    Example: python tools/train_digits.py --seed 1 --output digits_cnn.safetensors
    """
    parts = [load_set(name) for name in ("main_train", "sub_train")]
    images, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    network = new_network(seed)
    for epoch, loss in enumerate(train(network, images, labels, seed=seed, epochs=epochs), start=1):
        click.echo(f"epoch {epoch}/{epochs}: loss {loss:.4f}", err=True)
    made_by = f"python tools/train_digits.py --seed {seed} --epochs {epochs}"
    save_file(network.state_dict(), output, metadata={"made_by": made_by})
    click.echo(f"test accuracy {accuracy(network, *load_set('test')):.4f}")


if __name__ == "__main__":
    main()
