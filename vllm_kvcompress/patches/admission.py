"""Patch 1: image requests are checked, and their length is fixed, where every front end admits requests."""

import functools
from collections.abc import Callable
from typing import Any


def changes() -> list[Callable[[], object]]:
    """What wraps ``InputProcessor.process_inputs`` (vllm v1/engine/input_processor.py), once."""
    from vllm.v1.engine.input_processor import InputProcessor

    original = InputProcessor.process_inputs
    if getattr(original, "_kvcompress", False):
        return []

    @functools.wraps(original)
    def process_inputs(self: InputProcessor, *args: Any, **kwargs: Any) -> Any:
        request = original(self, *args, **kwargs)
        from vllm_kvcompress.models.registry import image_model, serves

        if serves(self.model_config):
            from vllm_kvcompress.admission import admit_request, align_request
            from vllm_kvcompress.config import parse_config
            from vllm_kvcompress.models.registry import default_max_tokens
            from vllm_kvcompress.text_room import text_room

            image = image_model(self.model_config)
            align_request(request, image)
            admit_request(
                request,
                image,
                self.model_config.max_model_len,
                room=text_room(self.vllm_config),
                limits=parse_config(self.vllm_config.additional_config).limits,
                default=default_max_tokens(self.model_config),
            )
        return request

    process_inputs._kvcompress = True  # type: ignore[attr-defined]
    return [functools.partial(setattr, InputProcessor, "process_inputs", process_inputs)]
