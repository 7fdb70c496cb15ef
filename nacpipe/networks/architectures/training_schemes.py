"""Networks of training schemes: OpenOOD's wrappers around a ResNet.

    image ──▶ backbone (a ResNet whose fc is the identity) ──▶ features (n, d) ──▶ the scheme's own layers ──▶ output

`forward` is that of evaluation. Layers that only training uses are defined too, because the checkpoints contain their
weights. A scheme that trains a plain ResNet (LogitNorm, AugMix, PixMix, RegMixup, RandAugment, DeepAugment, Stylized)
needs no class here: its checkpoints load into the ResNet's row of the table.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EMBEDDED = 128  # width of the embeddings of CIDER, NPOS and CSI
UDG_CLUSTERS = 1000


class Wrapped(nn.Module):
    """A backbone without its classifier; `width` is the number of its features."""

    classifier: ClassVar[str | None] = "fc"
    """Path of the linear layer whose output is the network's output; None if there is none."""
    outputs: ClassVar[str] = "logits"
    """logits, or features: embeddings without a predicted class."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        linear = backbone.get_submodule("fc")
        assert isinstance(linear, nn.Linear)
        self.width = linear.in_features
        backbone.add_module("fc", nn.Identity())
        self.backbone = backbone

    def features(self, x: Tensor) -> Tensor:
        """Return the features, (n, width)."""
        return torch.flatten(self.backbone(x), 1)


class _Classified(Wrapped):
    """A linear classifier on the features; subclasses add the heads that only training uses."""

    def __init__(self, backbone: nn.Module, classes: int) -> None:
        super().__init__(backbone)
        self.fc = nn.Linear(self.width, classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.features(x))
        return logits


class RotPred(_Classified):
    """Rotation prediction (Hendrycks et al., 2019)."""

    def __init__(self, backbone: nn.Module, classes: int) -> None:
        super().__init__(backbone, classes)
        self.rot_fc = nn.Linear(self.width, 4)  # rotations by quarter turns


class ConfBranch(_Classified):
    """Learned confidence (DeVries & Taylor, 2018)."""

    def __init__(self, backbone: nn.Module, classes: int) -> None:
        super().__init__(backbone, classes)
        self.confidence = nn.Linear(self.width, 1)


class UDG(_Classified):
    """Unsupervised dual grouping (Yang et al., 2021)."""

    def __init__(self, backbone: nn.Module, classes: int) -> None:
        super().__init__(backbone, classes)
        self.fc_aux = nn.Linear(self.width, UDG_CLUSTERS)


class CSI(Wrapped):
    """Contrasting shifted instances (Tack et al., 2020), after its second step."""

    classifier = "linear"

    def __init__(self, backbone: nn.Module, classes: int) -> None:
        super().__init__(backbone)
        self.linear = nn.Linear(self.width, classes)
        self.simclr_layer = _two_layers(self.width, EMBEDDED)
        self.joint_distribution_layer = nn.Linear(self.width, 4 * classes)
        self.shift_cls_layer = nn.Linear(self.width, 4)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.linear(self.features(x))
        return logits


class GODIN(Wrapped):
    """Generalised ODIN (Hsu et al., 2020) with cosine similarity, as in OpenOOD; logits are the quotient h / g.

    There is no linear classifier, so the cache contains neither classifier nor features.
    """

    classifier = None

    def __init__(self, backbone: nn.Module, classes: int) -> None:
        super().__init__(backbone)
        self.h = _Cosine(self.width, classes)
        self.g = nn.Sequential(nn.Linear(self.width, 1), nn.BatchNorm1d(1), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        features = self.features(x)
        quotient: Tensor = self.h(features) / self.g(features)  # (n, classes) / (n, 1)
        return quotient


class _Cosine(nn.Module):
    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.h = nn.Linear(width, classes, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        return _normalise(features) @ _normalise(self.h.weight).T


def _normalise(rows: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return rows / (norms + 1e-4)  # the constant of G-ODIN's code


class CIDER(Wrapped):
    """CIDER (Ming et al., 2023): the output is an embedding of length 1, not logits."""

    classifier = None
    outputs = "features"

    def __init__(self, backbone: nn.Module, _classes: int) -> None:
        super().__init__(backbone)
        self.head = _two_layers(self.width, EMBEDDED)

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.head(self.features(x)), dim=1)


class NPOS(CIDER):
    """NPOS (Tao et al., 2023): CIDER's network, with prototypes and a head that detects outliers during training."""

    def __init__(self, backbone: nn.Module, classes: int) -> None:
        super().__init__(backbone, classes)
        self.prototypes = nn.Parameter(torch.zeros(classes, EMBEDDED))
        self.mlp = nn.Sequential(nn.Linear(self.width, EMBEDDED), nn.ReLU(), nn.Linear(EMBEDDED, 1))


def _two_layers(width: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, outputs))


WRAPPERS: dict[str, type[CIDER | CSI | GODIN | RotPred | ConfBranch | UDG]] = {
    "cider": CIDER,
    "npos": NPOS,
    "rotpred": RotPred,
    "godin": GODIN,
    "confbranch": ConfBranch,
    "csi": CSI,
    "udg": UDG,
}
