"""Terms of the score: a layer, what of it goes under the sigmoid, and how its neurons are counted.

    layer3                          the product, counted as the paper does
    layer3:activation               another source
    layer3:by_class                 another view of the product
    layer3:activation:by_class      both

A score is the weighted sum of its terms (design §2). The network's output, `logits`, is a layer like the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from nacpipe.errors import ParamsError

Source = Literal["product", "activation", "gradient"]
View = Literal["plain", "by_class", "components"]
SOURCES: tuple[Source, ...] = get_args(Source)
VIEWS: tuple[View, ...] = get_args(View)

LOGITS = "logits"  # the network's output as a layer, which needs no tap: its gradient is known


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """One summand of the score."""

    layer: str
    source: Source = "product"
    """What goes under the sigmoid."""
    view: View = "plain"
    """`plain`: neurons among all training images. `by_class`: neurons among the training images of the same predicted
    class, or group of classes. `components`: principal components of the training values in place of neurons."""

    @property
    def name(self) -> str:
        """`layer3:activation:by_class`; product and plain are left out."""
        parts = [self.layer]
        parts += [self.source] if self.source != "product" else []
        parts += [self.view] if self.view != "plain" else []
        return ":".join(parts)

    @property
    def needs_gradient(self) -> bool:
        """Whether a backward pass is needed for its values: of the logits, the gradient follows from themselves."""
        return self.layer != LOGITS and self.source != "activation"

    def __str__(self) -> str:
        return self.name


def parse_term(name: str) -> Term:
    """Return the term of a name, `LAYER[:SOURCE][:VIEW]`; a layer's own name may have colons.

    Raises:
        ParamsError: a source is followed by something that is no view, or a view by a source.
    """
    view = next((word for word in VIEWS if name.endswith(f":{word}")), None)
    layer = name.removesuffix(f":{view}")
    source = next((word for word in SOURCES if layer.endswith(f":{word}")), None)
    layer = layer.removesuffix(f":{source}")
    before, colon, last = layer.rpartition(":")
    if colon and last in VIEWS:
        raise ParamsError(f"term {name!r} has a view twice or before its source; write LAYER:SOURCE:VIEW")
    if source is None and view is None and before.endswith(tuple(f":{word}" for word in SOURCES)):
        raise ParamsError(
            f"term {name!r} has the view {last!r}; known: {', '.join(VIEWS)}; use the nacpipe that wrote it, or make"
            " parameters anew with: nacpipe search CACHE"
        )
    return Term(layer=layer, source=source or "product", view=view or "plain")


def layer_of(name: str) -> str:
    """Return a term's layer: `layer3` of `layer3:gradient:by_class`."""
    return parse_term(name).layer


def source_of(name: str) -> Source:
    """Return the source that a term is named after, the product where it is named after none."""
    return parse_term(name).source


def view_of(name: str) -> View:
    """Return the view that a term is named after, `plain` where it is named after none."""
    return parse_term(name).view
