"""A config.json is data from elsewhere: whatever is wrong with it is a ValueError of one line."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from vllm_kvcompress import last_word


@contextmanager
def reading() -> Iterator[None]:
    """Around what makes a configuration of a file: also a reason not to start (`last_word`)."""
    with last_word.heard():
        try:
            yield
        except (StrictDataclassError, AttributeError, LookupError, TypeError) as error:
            found = " ".join(str(error).removeprefix("Validation error for field").split())
            raise ValueError(f"config.json: {found:.200}") from None


def section(value: Any, name: str) -> dict[str, Any]:
    """What a section of config.json says; empty where there is none. Raises ValueError, one line."""
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"config.json: {name} must be an object, got {value!r:.60}")
    return dict(value or {})


def section_params(value: Any, name: str) -> dict[str, Any]:
    """``params`` of a section of the original layout's config.json, as `section`."""
    return section(section(value, name).get("params"), f"{name}.params")
