"""`--model` and `--checkpoint` of a detector's network, as far as the cache that it is from knows them; no torch."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nacpipe.cache.options import read_options
from nacpipe.detector.file import Exported
from nacpipe.errors import InputError


def network_options(identity: Mapping[str, Any], information: Mapping[str, Any]) -> list[str]:
    """Return the options that name a cache's network to `score`; what the cache does not know stands in capitals.

    A function in a file, timm's networks and a checkpoint's file are used only where a person names them.

    Args:
        identity: of the cache's header.
        information: the same.
    """
    architecture = str(identity.get("architecture"))
    options = read_options(information)  # None: the cache was not made by an extract that records them
    words = []
    if architecture.startswith("timm:"):
        words = ["--model", architecture]
    elif identity.get("family") == "custom" or ":" in architecture:
        unknown = f"FOLDER/{architecture}" if ":" in architecture else "FILE.py:FUNCTION"
        known = None if options is None or not options.model.endswith(architecture) else options.model
        words = ["--model", known or unknown]
    if options is None:
        checkpoint = str(information.get("checkpoint") or "CHECKPOINT")
        words += ["--checkpoint", f"FOLDER/{checkpoint}" if Path(checkpoint).suffix else checkpoint]
    elif options.checkpoint is not None:
        words += ["--checkpoint", str(options.checkpoint)]
    return words


def check_network_is_named(exported: Exported, file: str, model: str | None, checkpoint: Path | None) -> None:
    """Refuse a network that is in a file, or is fetched, and that nobody named: code is run where someone asks for it.

    Args:
        exported: the detector.
        file: where it is, for messages.
        model: the network that was named.
        checkpoint: its weights, if they were named.

    Raises:
        InputError: saying how to name it.
    """
    if model is None and ":" in str(exported.identity.get("architecture")):
        raise InputError(name_network(exported, file, checkpoint))


def name_network(exported: Exported, file: str, checkpoint: Path | None) -> str:
    """Return the sentence that says how to name a detector's network."""
    extraction = exported.information.get("extraction")
    words = network_options(exported.identity, extraction if isinstance(extraction, Mapping) else {})
    if checkpoint is not None and "--checkpoint" in words:
        words = words[: words.index("--checkpoint")]
    return f"{file} is for {exported.identity.get('architecture')}; say where it is with {shlex.join(words)}"
