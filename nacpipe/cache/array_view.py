"""An array of a split that is sliced like a numpy array. Its rows are checked by `SplitView.read`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import EllipsisType
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray


class ArrayView:
    """A read-only array; slicing reads it from the store, and nothing is kept in memory.

    It accepts numpy's selections: slices with steps, integers, arrays of integers, boolean masks, an ellipsis. Only the
    blocks of the selected rows are read.
    """

    def __init__(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        block_rows: int,
        read: Callable[[slice], NDArray[Any]],
    ) -> None:
        """Make the view of an array.

        Args:
            name: how `repr` and errors call it, such as id/val/logits.
            shape: (rows,) or (rows, width).
            dtype: of its values.
            block_rows: the rows of a chunk.
            read: returns the rows of a slice of step 1.
        """
        self.shape = shape
        """(rows,) or (rows, width)."""
        self.dtype = dtype
        self._name, self._block_rows, self._rows = name, block_rows, read

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of values."""
        return int(np.prod(self.shape, dtype=np.int64))

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[NDArray[Any]]:
        for start in range(0, len(self), self._block_rows):
            yield from self._read(start, min(start + self._block_rows, len(self)))

    def __repr__(self) -> str:
        return f"<{self._name} {self.shape} {self.dtype}>"

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        if copy is False:
            raise ValueError(f"{self!r} is read from a store: there is no array without a copy")
        return np.asarray(self[:], dtype)

    def __getitem__(self, selection: Any) -> Any:
        """Return the selected values, a numpy array, or a number if every axis is selected by an integer.

        Raises:
            CacheError: a chunk is damaged or missing, naming the array.
            ValuesError: logits or features contain NaN or infinity.
            IndexError: the selection does not fit the shape.
        """
        rows, *others = self._per_axis(selection)
        if isinstance(rows, slice):
            places = range(*rows.indices(len(self)))
            backwards = places.step < 0
            values = self._gather(places[::-1] if backwards else places)
            return values[(slice(None, None, -1 if backwards else None), *others)]
        places = np.arange(len(self))[rows]  # numpy raises IndexError
        needed, where = np.unique(places, return_inverse=True)
        values = self._gather(needed)
        return values[(where.reshape(places.shape) if places.ndim else 0, *others)]

    def _per_axis(self, selection: Any) -> list[Any]:
        """Return one selection for each axis, that of the rows first."""
        parts: list[Any] = []
        for part in selection if isinstance(selection, tuple) else (selection,):
            array = None if part is None or isinstance(part, slice | EllipsisType) else np.asarray(part)
            if array is None and part is not None:
                parts.append(part)
            elif array is not None and array.dtype == bool and array.ndim:
                parts += [array] if array.ndim == 1 else self._mask(array, len(parts))
            elif array is not None and (array.dtype.kind in "iu" or (array.size == 0 and isinstance(part, list))):
                parts.append(array.astype(np.intp) if array.ndim else int(array))
            else:
                raise IndexError(f"{self!r} takes slices, whole numbers, arrays of them, masks and ..., not {part!r}")
        gaps = [place for place, part in enumerate(parts) if part is ...]
        lacking = self.ndim - len(parts) + len(gaps)
        if lacking < 0 or len(gaps) > 1:
            raise IndexError(f"{self!r} has {self.ndim} axes; {len(parts)} were selected from")
        place = gaps[0] if gaps else len(parts)
        return parts[:place] + [slice(None)] * lacking + parts[place + len(gaps) :]

    def _mask(self, mask: NDArray[np.bool_], axis: int) -> tuple[NDArray[np.intp], ...]:
        """Return a mask over several axes as positions on each."""
        if mask.shape != self.shape[axis : axis + mask.ndim]:
            raise IndexError(f"{self!r} does not take a mask of {mask.shape}")
        return mask.nonzero()

    def _gather(self, places: Any) -> NDArray[Any]:
        """Return the rows at ascending, distinct positions; block by block if they are not contiguous."""
        count = len(places)
        if count == 0 or places[-1] - places[0] + 1 == count:
            start = int(places[0]) if count else 0
            return self._read(start, start + count)
        values = np.empty((count, *self.shape[1:]), self.dtype)
        places = np.asarray(places)
        blocks = places // self._block_rows
        for block in np.unique(blocks):
            wanted = blocks == block
            first = int(places[wanted][0])
            values[wanted] = self._read(first, int(places[wanted][-1]) + 1)[places[wanted] - first]
        return values

    def _read(self, start: int, stop: int) -> NDArray[Any]:
        return self._rows(slice(start, stop))
