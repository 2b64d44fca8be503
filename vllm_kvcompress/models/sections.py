"""A config.json is data from elsewhere: whatever is wrong with it is a ValueError of one line."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from vllm_kvcompress import last_word


@contextmanager
def reading() -> Iterator[None]:
    """Around what makes a configuration of a file: also a reason not to start (`last_word`)."""
    with last_word.heard():
        try:
            yield
        except (StrictDataclassError, AttributeError, LookupError, TypeError) as error:
            found = " ".join(str(error).removeprefix("Validation error for field").split())
            raise ValueError(f"config.json: {found:.200}; correct it, or download the file again") from None


def heard_class(kind: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """For tables of configuration classes: makes ``kind``'s own objects of files, in `reading`.

    Of a class that is transformers' own, whose tables know its objects by their class.
    """

    class Heard(kind):  # type: ignore[misc, valid-type]
        @classmethod
        @reading()
        def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
            return kind.from_dict(config_dict, **kwargs)

    return Heard


def section(value: Any, name: str) -> dict[str, Any]:
    """What a section of config.json says; empty where there is none. Raises ValueError, one line."""
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"config.json: {name} must be an object, got {value!r:.60}")
    return dict(value or {})


def section_params(value: Any, name: str) -> dict[str, Any]:
    """``params`` of a section of the original layout's config.json, as `section`."""
    return section(section(value, name).get("params"), f"{name}.params")
