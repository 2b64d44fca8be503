"""Patch 5: a picture in a chat that can't be had is the client's mistake, and says which field."""

import functools
from typing import Any

FIELD = "image_url"
_MARK = "_kvcompress"


def apply() -> None:
    """Wrap ``MediaConnector.fetch_image``, ``fetch_image_async`` and ``BaseMultiModalItemTracker.add``.

    (vllm multimodal/media/connector.py and renderers/chat_utils.py.) Called where one of our models is
    configured. Whatever they raise for a picture becomes a 400 that names ``image_url``; what may be loaded
    is their own decision.
    """
    from vllm.exceptions import VLLMError
    from vllm.multimodal.media.connector import MediaConnector
    from vllm.renderers.chat_utils import BaseMultiModalItemTracker

    from vllm_kvcompress.refusal import BadParameter

    def named(error: Exception) -> BadParameter:
        reason = " ".join(str(error).split()) or type(error).__name__
        return BadParameter(FIELD, f"{FIELD}: no picture to be had: {reason:.300}")

    fetch: Any = MediaConnector.fetch_image
    fetch_async: Any = MediaConnector.fetch_image_async
    add: Any = BaseMultiModalItemTracker.add
    if getattr(fetch, _MARK, False):
        return

    @functools.wraps(fetch)
    def fetch_image(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return fetch(self, *args, **kwargs)
        except VLLMError:
            raise
        except Exception as error:
            raise named(error) from error

    @functools.wraps(fetch_async)
    async def fetch_image_async(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return await fetch_async(self, *args, **kwargs)
        except VLLMError:
            raise
        except Exception as error:
            raise named(error) from error

    @functools.wraps(add)
    def add_item(self: Any, modality: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return add(self, modality, *args, **kwargs)
        except VLLMError:
            raise
        except ValueError as error:  # a model of classes, which has no chats at all
            field = FIELD if modality == "image" else modality
            raise BadParameter(field, f"{field}: {error}") from error

    setattr(fetch_image, _MARK, True)
    MediaConnector.fetch_image = fetch_image  # type: ignore[method-assign]
    MediaConnector.fetch_image_async = fetch_image_async  # type: ignore[method-assign]
    BaseMultiModalItemTracker.add = add_item  # type: ignore[method-assign]
