"""Networks of training schemes, wrapped around a ResNet as OpenOOD's checkpoints have it.

    image ──▶ backbone (a ResNet whose fc is the identity) ──▶ features (n, d) ──▶ the scheme's own layers ──▶ output

Written here is what runs when an image is looked at; layers that only training used stand beside it, because the
checkpoints hold their weights. A scheme that trains a plain ResNet (LogitNorm, AugMix, PixMix, RegMixup, RandAugment,
DeepAugment, Stylized) needs nothing here: its checkpoints load into the ResNet's own row.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EMBEDDED = 128  # width of what CIDER, NPOS and CSI embed images in
UDG_CLUSTERS = 1000


class Wrapped(nn.Module):
    """A backbone without its classifier; `width` is that of its features."""

    classifier: ClassVar[str | None] = "fc"
    """Path of the linear layer whose output is the network's."""
    outputs: ClassVar[str] = "logits"
    """Or features: then there is no class to predict."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        linear = backbone.get_submodule("fc")
        assert isinstance(linear, nn.Linear)
        self.width = linear.in_features
        backbone.add_module("fc", nn.Identity())
        self.backbone = backbone

    def features(self, x: Tensor) -> Tensor:
        """Give (n, width)."""
        return torch.flatten(self.backbone(x), 1)


class _Classified(Wrapped):
    """A linear classifier on the features; the scheme's other heads learn beside it."""

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
        self.rot_fc = nn.Linear(self.width, 4)  # a quarter turn each


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
    """Generalised ODIN (Hsu et al., 2020) with cosine similarity, OpenOOD's choice; logits are the quotient h / g.

    There is no linear classifier: neither weights nor features go to the cache.
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
        return _shrink(features) @ _shrink(self.h.weight).T


def _shrink(rows: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return rows / (norms + 1e-4)  # G-ODIN's small number


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
    """NPOS (Tao et al., 2023): as CIDER's, with prototypes and a head that tells outliers while it learns."""

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
