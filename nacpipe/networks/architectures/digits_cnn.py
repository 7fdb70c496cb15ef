"""The network of the packaged benchmark `digits`: small enough for a CPU, with a ResNet's module names.

    image (n, 1, 28, 28) → layer1 (n, 16, 28, 28) → layer2 (n, 32, 14, 14) → layer3 (n, 64, 7, 7)
                         → avgpool (n, 64, 1, 1)  → fc (n, 10)

`tools/train_digits.py` makes the weights in `digits_cnn.safetensors`.
"""

from __future__ import annotations

import torch
from torch import nn

# The usual mean and standard deviation of MNIST, of pixels in 0..1; one channel.
MEAN = (0.1307,)
STD = (0.3081,)


class DigitsCNN(nn.Module):
    """Three pairs of convolutions, the second and third of which halve the image, then a linear classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.layer1 = _layer(1, 16, stride=1)
        self.layer2 = _layer(16, 32, stride=2)
        self.layer3 = _layer(32, 64, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the logits, (n, 10), of normalised images, (n, 1, 28, 28)."""
        x = self.layer3(self.layer2(self.layer1(images)))
        logits: torch.Tensor = self.fc(self.avgpool(x).flatten(1))
        return logits


def _layer(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    # The ReLUs are not in place, because they would overwrite a tapped output.
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
        nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )
