"""Make resnet20.npz: what the authors' code gave for 72 images, small enough to lie in the repository.

    python tests/data/reference/make.py ../shared/reference/resnet20

Held are the 72 images' activations, gradients, labels and logits, the authors' score of each under two sets of
parameters and what metrics these scores give. Of the 1,000 training images it holds only in which bins their products
fall, under both sets at once: per neuron the interval between two neighbouring borders (of either set) that each
product lies in, sorted. A value from the middle of that interval falls into the same bins as the product itself, so
counts are those of the training images.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from sklearn.metrics import auc, precision_recall_curve, roc_auc_score

from nacpipe.method.coverage import bin_edges, product_borders

LAYERS = ("avgpool", "layer3", "layer2", "layer1")
SETS = ("published", "tuned")
ROWS = {"id-val": slice(0, 30), "ood-val": slice(0, 30), "id-subtrain": slice(0, 12)}


def main(folder: Path) -> None:
    """Write the file beside this script."""
    known = json.loads((folder / "metrics.json").read_text())
    arrays = {name: dict(np.load(folder / f"{name}.npz")) for name in ("id-train", *ROWS)}
    held: dict[str, np.ndarray] = {}
    for layer in LAYERS:
        params = [known[name]["params"][layer] for name in SETS]
        borders = [product_borders(bin_edges(p["bins"]), p["alpha"]) for p in params]
        inner = np.unique(np.concatenate(borders))[1:-1].astype(np.float64)
        middles = (inner[:-1] + inner[1:]) / 2
        values = np.concatenate([[2 * inner[0]], middles, [2 * inner[-1]]]).astype(np.float32)
        train = arrays["id-train"]
        products = train[f"{layer}.activation"] * train[f"{layer}.gradient"]
        intervals = np.sort(np.searchsorted(inner, products.astype(np.float64), side="right"), axis=0)
        for border in borders:  # the same bins as the products themselves
            ours, theirs = (np.sort(np.searchsorted(border, x, "right"), axis=0) for x in (values[intervals], products))
            assert (ours == theirs).all(), layer
        held[f"{layer}.values"] = values
        held[f"{layer}.train_steps"] = np.diff(intervals, axis=0, prepend=0).astype(np.uint16)
    for split, rows in ROWS.items():
        for name, values in arrays[split].items():
            held[f"{split}.{name}"] = values[rows]
        for which in SETS:
            held[f"{split}.scores-{which}"] = np.load(folder / f"scores-{which}.npz")[split][rows]
    for which in SETS:
        inside, outside = (held[f"{split}.scores-{which}"] for split in ("id-val", "ood-val"))
        held[f"metrics-{which}"] = np.array(_measure(inside, outside))
    held["params"] = np.frombuffer(json.dumps({s: known[s]["params"] for s in SETS}).encode(), np.uint8)
    target = Path(__file__).with_name("resnet20.npz")
    np.savez_compressed(target, **held)
    print(target, target.stat().st_size)


def _measure(inside: np.ndarray, outside: np.ndarray) -> tuple[float, float, float]:
    """AUROC, and the two areas under precision and recall, ID then OOD as the positive class, by scikit-learn alone."""
    is_id = np.repeat([1, 0], [len(inside), len(outside)])
    scores = np.concatenate([inside, outside]).astype(np.float64)
    areas = []
    for positive, value in ((is_id, scores), (1 - is_id, -scores)):
        precision, recall, _ = precision_recall_curve(positive, value)
        areas.append(float(auc(recall, precision)))
    return float(roc_auc_score(is_id, scores)), areas[0], areas[1]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
