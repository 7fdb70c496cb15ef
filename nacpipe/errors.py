"""The errors that nacpipe raises.

    NacError                 one line; the command line exits with 1
    ├── InputError           a name, value or file that the user gave does not fit
    │   ├── ParamsError      a parameter file or record is malformed or does not fit the cache
    │   ├── ImageError       a listed image is missing or cannot be read
    │   ├── CheckpointError  weights do not fit the network
    │   └── DetectorError    an exported detector is malformed or does not fit the network
    ├── CacheError           the store does not exist, is damaged or not finished
    │   ├── FormatError      written by a version of the format that this nacpipe cannot read
    │   ├── IdentityError    the cache was made from something else (weights, layers, lists, …)
    │   └── ValuesError      NaN or infinity among the cached values
    ├── DownloadError        an archive cannot be fetched or unpacked, or lacks files
    ├── StudyError           a search cannot start or continue
    └── MissingExtra         an optional package is needed; the message says how to install it

Messages name the thing, the value and the next command. Inner functions state the fact; their callers add the address
with ``add_note``; the command line prints both on one line.
"""

from __future__ import annotations


class NacError(Exception):
    """The base class of nacpipe's errors."""

    def one_line(self) -> str:
        """Return the message and the notes that callers added, on one line."""
        return "; ".join([str(self), *getattr(self, "__notes__", [])]).replace("\n", " ")


class InputError(NacError):
    """A name, value or file that the user gave does not fit."""


class ParamsError(InputError):
    """A parameter file or record is malformed or does not fit the cache."""


class ImageError(InputError):
    """A listed image is missing or cannot be read."""


class CheckpointError(InputError):
    """Weights do not fit the network."""


class DetectorError(InputError):
    """An exported detector is malformed or does not fit the network."""


class CacheError(NacError):
    """The store does not exist, is damaged or not finished."""


class FormatError(CacheError):
    """The store was written by a version of the format that this nacpipe cannot read."""


class IdentityError(CacheError):
    """The cache was made from something else: other weights, layers, image lists, …"""


class ValuesError(CacheError):
    """NaN or infinity among the cached values."""


class NoValuesError(ValuesError):
    """A term tells nothing: all of its values are 0, or all are the same."""


class DownloadError(NacError):
    """An archive cannot be fetched or unpacked, or lacks files."""


class StudyError(NacError):
    """A search cannot start or continue."""


class MissingExtra(NacError):
    """An optional package is needed."""


def first_line(error: BaseException, most: int = 200) -> str:
    """Return the first line of an error's message, at most so many characters; its type's name where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0][:most]
