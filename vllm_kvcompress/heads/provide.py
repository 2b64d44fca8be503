"""The head profile of the served model: the file asked for, the model's own, the cached one, or measured."""

import hashlib
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vllm import envs

from vllm_kvcompress.heads.profile import HeadProfile
from vllm_kvcompress.log import logger_for

logger = logger_for(__name__)

AUTO = "auto"
OWN = "head_profile.json"  # beside a checkpoint's weights
MOST_BYTES = 1 << 28  # of a file beside the weights


@dataclass(frozen=True)
class ModelMark:
    """Which model a profile is for: its name, a fingerprint of its weights, layers and KV heads.

    ``variant`` tells what comes of a profile of the model's own from what is measured here.
    """

    name: str
    fingerprint: str
    layers: int
    kv_heads: int
    variant: str = ""

    @property
    def path(self) -> Path:
        """Where its profile is kept."""
        variant = self.variant and f"-{self.variant}"
        return cache_directory() / f"{self.name}-{self.fingerprint}{variant}.json"

    def check(self, profile: HeadProfile) -> None:
        """Raise ValueError, one line, unless the profile is this model's."""
        profile.check_model("", self.fingerprint, self.layers, self.kv_heads)


def cache_directory() -> Path:
    """Where profiles made at start-up are kept, below vLLM's own cache directory."""
    return Path(envs.VLLM_CACHE_ROOT) / "kvcompress" / "head_profiles"


def provide_profile(
    source: str,
    mark: ModelMark,
    measure: Callable[[], HeadProfile],
    usable: Callable[[HeadProfile], bool] = lambda profile: True,
    again: bool = False,
    agree: Callable[[Any], Any] = lambda value: value,
    first: bool = True,
    own: HeadProfile | None = None,
) -> HeadProfile:
    """The profile to choose head types by.

    Parameters
    ----------
    source : str
        A file, or ``auto``: the model's own, else the user's cache, else measured and kept there.
    mark : ModelMark
    measure : callable
        Calibrates the model.
    usable : callable
        Whether a cached profile will do: another version may have left it. A named one is taken as it is.
    again : bool
        With ``auto``, measure even if there is a profile.
    agree : callable
        A value -> the first rank's: where several processes serve one model, one of them reads and writes,
        and all measure or none.
    first : bool
        Whether this process is that one.
    own : HeadProfile, optional
        What came with the model (`own_profile`); the cache may have it with more fits tried.

    Raises
    ------
    ValueError
        One line: a named file that can't be read or was made for another model. What is wrong with a cached
        one, or with the cache, is a warning.
    """
    if source != AUTO:
        named = agree(_named(source, mark) if first else None)
        if isinstance(named, ValueError):
            raise named
        return named
    path = mark.path
    cached = _cached(path, mark) if first and not again else None
    cached = agree(cached if cached is not None and usable(cached) else None)
    if cached is not None:
        if first:
            logger.info("Head profile: %s", path)
        return cached
    if own is not None and not again:
        if first:
            logger.info("Head profile: the model's own %s", OWN)
        return own
    profile = measure()
    if first:
        keep(profile, mark)
    return profile


def own_profile(
    content: bytes | None, mark: ModelMark, check: Callable[[HeadProfile], None] = lambda profile: None
) -> tuple[HeadProfile | None, ModelMark]:
    """The profile that a checkpoint brings beside its weights, and the mark to keep it under.

    Parameters
    ----------
    content : bytes, optional
        Of its `OWN` file. One that is of other weights, or can't be read, is a warning: it is left alone.
    check : callable
        Raises ValueError, one line, for what the model can't take.
    """
    if content is None:
        return None, mark
    try:
        profile = HeadProfile.parse(content, OWN)
        mark.check(profile)
        if profile.format == 1:
            raise ValueError("it has locality scores only (format 1)")
        check(profile)
    except ValueError as error:
        logger.warning("The model's own head profile is set aside: %s", error)
        return None, mark
    return profile, replace(mark, variant=hashlib.sha256(content).hexdigest()[:8])


def keep(profile: HeadProfile, mark: ModelMark, now: str = "calibrated") -> None:
    """Leave it for the next start, if that can be; ``now``: what has become of it, for the log."""
    path = mark.path
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        check_private(path.parent)
        profile.save(path)
    except (OSError, ValueError) as error:
        logger.warning("Head profile %s; not kept for the next start: %s", now, error)
    else:
        logger.info("Head profile %s, kept in %s", now, path)


def _named(source: str, mark: ModelMark) -> HeadProfile | ValueError:
    """The profile of a file, or what is wrong with it, which all ranks are to say."""
    try:
        profile = HeadProfile.load(source)
        mark.check(profile)
    except ValueError as error:
        return error
    return profile


def _cached(path: Path, mark: ModelMark) -> HeadProfile | None:
    """The profile that is there, if it can be trusted and read and is this model's."""
    try:
        if not path.exists():
            return None
        check_private(path.parent)
        profile = HeadProfile.load(path)
        mark.check(profile)
    except (OSError, ValueError) as error:
        logger.warning("Cached head profile set aside, the heads are measured again: %s", error)
        return None
    return profile


def check_private(folder: Path) -> None:
    """Raise ValueError, one line, if others can write there: a planted profile changes pictures."""
    status = folder.stat()
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) or status.st_uid not in (0, os.geteuid()):
        raise ValueError(f"{folder} can be written by others; chmod go-w, or set VLLM_CACHE_ROOT")
