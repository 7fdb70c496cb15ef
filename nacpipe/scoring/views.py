"""What the views of a cache's terms need beside states, and which terms its data allow."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from nacpipe.cache import Cache, SplitView
from nacpipe.errors import ParamsError
from nacpipe.method.class_groups import IMAGES_PER_GROUP, ClassGroups, choose_groups, count_groups_for
from nacpipe.method.components import IMAGES_PER_NEURON, has_enough_images
from nacpipe.method.term import LOGITS, VIEWS, Term
from nacpipe.scoring.states import PIECE, has_classes, held_layers, held_sources, outputs_of


def list_terms(cache: Cache) -> list[Term]:
    """Return every term that the cache could have: each held layer × source × view, views of one source together."""
    return [
        Term(layer=layer, source=source, view=view)
        for layer in held_layers(cache)
        for source in held_sources(cache, layer)
        for view in VIEWS
    ]


def available_terms(cache: Cache) -> list[Term]:
    """Return the terms that the data allow; `why_unavailable` says of the others why not."""
    return [term for term in list_terms(cache) if why_unavailable(cache, term) is None]


def why_unavailable(cache: Cache, term: Term) -> str | None:
    """Return why the data do not allow a term, None where they do.

    By the number of training images: a term that is scored all the same is scored as `nacpipe.method` says.
    """
    rows = cache["id/train"].rows
    if term.view == "by_class":
        if not has_classes(cache):
            return f"what this network gives are {outputs_of(cache)}, of which the largest is no predicted class"
        if count_groups_for(rows, cache.header.classes) < 2:
            return f"two groups of classes need {2 * IMAGES_PER_GROUP} training images; id/train has {rows}"
    if term.view == "components":
        neurons = cache.header.classes if term.layer == LOGITS else cache.header.layer(term.layer).neurons
        if not has_enough_images(rows, neurons):
            needed = IMAGES_PER_NEURON * neurons
            return f"components of {neurons} neurons need {needed} training images; id/train has {rows}"
    return None


def read_groups(cache: Cache) -> ClassGroups:
    """Return the groups of classes that `by_class` counts among (design §3).

    Raises:
        ParamsError: the network's outputs are no classes.
    """
    if not has_classes(cache):
        raise ParamsError(
            f"terms by_class need predicted classes; {cache.path} is of a network that gives {outputs_of(cache)};"
            " leave these terms out"
        )
    train, classifier = cache["id/train"], cache.classifier()
    logits = (train.read("logits", rows) for rows in train.row_slices(PIECE))
    return choose_groups(logits, None if classifier is None else classifier[0])


def assign_groups(groups: ClassGroups, split: SplitView) -> NDArray[np.int32]:
    """Return the group of each sample's predicted class, (rows,)."""
    return np.concatenate([groups.assign(split.read("logits", rows)) for rows in split.row_slices(PIECE)])
