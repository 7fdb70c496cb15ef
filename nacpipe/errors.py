"""Everything that nacpipe raises on purpose.

    NacError                 one line for people; the command line exits with 1
    ├── InputError           a name, value or file that the user gave does not fit
    │   ├── ParamsError      a parameter file or record is malformed or does not fit the cache
    │   ├── ImageError       a listed image is missing or cannot be read
    │   ├── CheckpointError  weights do not fit the network
    │   └── DetectorError    an exported detector is malformed or does not fit the network
    ├── CacheError           the store is not there, damaged or not finished
    │   ├── FormatError      written by a version of the format that this nacpipe cannot read
    │   ├── IdentityError    the cache was made from something else (weights, layers, lists, …)
    │   └── ValuesError      NaN or infinity among the cached values
    ├── DownloadError        an archive cannot be fetched or unpacked, or lacks files
    ├── StudyError           a search cannot start or go on
    └── MissingExtra         an optional package is needed; the message says how to install it

Messages name the thing, the value and the next command. Deep code states the fact; rooms above add the address with
``add_note``; the command line prints both on one line.
"""

from __future__ import annotations


class NacError(Exception):
    """The base of all errors that are meant for a person."""

    def one_line(self) -> str:
        """The message and the notes that rooms above added, on one line."""
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
    """The store is not there, damaged or not finished."""


class FormatError(CacheError):
    """The store was written by a version of the format that this nacpipe cannot read."""


class IdentityError(CacheError):
    """The cache was made from something else: other weights, layers, image lists, …"""


class ValuesError(CacheError):
    """NaN or infinity among the cached values."""


class DownloadError(NacError):
    """An archive cannot be fetched or unpacked, or lacks files."""


class StudyError(NacError):
    """A search cannot start or go on."""


class MissingExtra(NacError):
    """An optional package is needed."""
