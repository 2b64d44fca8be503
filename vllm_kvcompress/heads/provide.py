"""The head profile of the served model: from the file asked for, from the user's cache, or by measuring."""

import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm import envs

from vllm_kvcompress.heads.profile import HeadProfile
from vllm_kvcompress.log import logger_for

logger = logger_for(__name__)

AUTO = "auto"


@dataclass(frozen=True)
class ModelMark:
    """Which model a profile is for: its name, a fingerprint of its weights, layers and KV heads."""

    name: str
    fingerprint: str
    layers: int
    kv_heads: int

    @property
    def path(self) -> Path:
        """Where its profile is kept."""
        return cache_directory() / f"{self.name}-{self.fingerprint}.json"

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
) -> HeadProfile:
    """The profile to choose head types by.

    Parameters
    ----------
    source : str
        A file, or ``auto``: the user's cache, else measured and kept there.
    mark : ModelMark
    measure : callable
        Calibrates the model.
    usable : callable
        Whether a cached profile will do: another version may have left it. A named one is taken as it is.
    again : bool
        With ``auto``, measure even if a profile is in the cache.
    agree : callable
        A value -> the first rank's: where several processes serve one model, one of them reads and writes,
        and all measure or none.
    first : bool
        Whether this process is that one.

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
    profile = measure()
    if first:
        keep(profile, mark)
    return profile


def keep(profile: HeadProfile, mark: ModelMark, now: str = "calibrated") -> None:
    """Leave it for the next start, if that can be; ``now``: what has become of it, for the log."""
    path = mark.path
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        _check_private(path.parent)
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
        _check_private(path.parent)
        profile = HeadProfile.load(path)
        mark.check(profile)
    except (OSError, ValueError) as error:
        logger.warning("Cached head profile set aside, the heads are measured again: %s", error)
        return None
    return profile


def _check_private(folder: Path) -> None:
    """Raise ValueError, one line, if others can write there: a planted profile changes pictures."""
    status = folder.stat()
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) or status.st_uid not in (0, os.geteuid()):
        raise ValueError(f"{folder} can be written by others; chmod go-w, or set VLLM_CACHE_ROOT")
