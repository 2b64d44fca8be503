"""Pictures in a chat, on their way from the request to the model: vLLM's multimodal processor for Janus.

A picture is scaled until its longer side fits the tower, padded to a square with the mean colour and
normalised; in the prompt, its placeholder becomes begin-of-image, one placeholder a token of the tower,
end-of-image (deepseek-ai/Janus janus/models/image_processing_vlm.py, processing_vlm.py; transformers
models/janus). The pixel arithmetic is transformers' own, in the variant that works on PIL pictures as the
published code does, so that a picture is the same with and without torchvision.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import BatchFeature
from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil
from vllm.config.multimodal import MultiModalDummyOptions
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems
from vllm.multimodal.parse import ImageEmbeddingItems, ImageProcessorItems, MultiModalDataItems
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptReplacement,
    PromptUpdate,
    PromptUpdateDetails,
)

from vllm_kvcompress.models.checkpoint import has_vision
from vllm_kvcompress.models.tokenizer import BOI, BOS, EOI, IMAGE, PAD, token_id
from vllm_kvcompress.models.vision_sizes import NO_PICTURES, VisionSizes, vision_sizes
from vllm_kvcompress.refusal import BadParameter

if TYPE_CHECKING:
    from vllm.config import ModelConfig

PIXELS = "pixel_values"
_SEES = "kvcompress_sees_pictures"  # kept with the configuration

# What Janus's own files say; a file that leaves a value out means these, not transformers' (CLIP's colours).
_DEFAULTS: dict[str, Any] = {
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "rescale_factor": 1 / 255,
    "min_size": 14,
    "do_normalize": True,
}


def looks(model_config: "ModelConfig") -> bool:
    """Whether pictures may come in: the checkpoint can take them, and the operator lets them.

    Pictures that clients have embedded themselves (``--enable-mm-embeds``) need no tower.
    """
    config = model_config.multimodal_config
    return (
        config is not None
        and config.get_limit_per_prompt("image") > 0
        and model_config.supports_multimodal_inputs
    )


def check_pictures(model_config: "ModelConfig") -> None:
    """Raise ValueError, one line, where the checkpoint's files for pictures are of no use."""
    info: Any = MULTIMODAL_REGISTRY.get_processing_info(model_config)
    _ = info.processor, info.replacement


def image_processor(model: str, revision: str | None, sizes: VisionSizes) -> JanusImageProcessorPil:
    """transformers' processor with the constants of the checkpoint's preprocessor_config.json.

    Raises ValueError, one line, naming a constant that is of no use or does not fit the tower.
    """
    try:
        stored, _ = JanusImageProcessorPil.get_image_processor_dict(model, revision=revision)
    except OSError:
        if (Path(model) / "preprocessor_config.json").is_file():
            raise ValueError("preprocessor_config.json can't be read: download it again") from None
        stored = {}  # neither it nor processor_config.json is there
    if not isinstance(stored, dict):
        raise ValueError("preprocessor_config.json must hold an object")
    constants = {name: stored.get(name, value) for name, value in _DEFAULTS.items()}
    size = stored.get("size", stored.get("image_size", sizes.image_size))
    for side in size.values() if isinstance(size, dict) else (size,):
        if side != sizes.image_size:
            raise _unfit("size", size, f"{sizes.image_size}, what the vision tower takes")
    for name in ("image_mean", "image_std"):
        values = constants[name]
        least = 0 if name == "image_mean" else 1e-6
        if not isinstance(values, list) or len(values) != 3 or not all(_is(v, least, 1e6) for v in values):
            raise _unfit(name, values, "three numbers")
    if not _is(constants["rescale_factor"], 1e-12, 1):
        raise _unfit("rescale_factor", constants["rescale_factor"], "a number up to 1")
    least = constants["min_size"]
    if type(least) is not int or not 1 <= least <= sizes.image_size:
        raise _unfit("min_size", least, f"a number from 1 to {sizes.image_size}")
    if type(constants["do_normalize"]) is not bool:
        raise _unfit("do_normalize", constants["do_normalize"], "true or false")
    side = sizes.image_size
    return JanusImageProcessorPil(**constants, size={"height": side, "width": side}, do_convert_rgb=True)


def _is(value: Any, least: float, most: float) -> bool:
    return not isinstance(value, bool) and isinstance(value, (int, float)) and least <= value <= most


def _unfit(name: str, value: Any, wanted: str) -> ValueError:
    return ValueError(
        f"preprocessor_config.json: {name} must be {wanted}, got {value!r:.60}; {NO_PICTURES} serves the "
        "model without it"
    )


class PictureInfo(BaseProcessingInfo):
    """What vLLM asks about pictures before it has one."""

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        # vLLM asks anew for each chat with a picture: the files' headers are read once.
        config = self.ctx.model_config
        if not hasattr(config.hf_config, _SEES):
            setattr(config.hf_config, _SEES, has_vision(Path(config.model), config.hf_config))
        return {"image": None} if getattr(config.hf_config, _SEES) else {}

    def validate_num_items(self, modality: str, num_items: int) -> None:
        message = None
        if not self.supported_mm_limits:
            message = "this checkpoint has no vision tower: it draws pictures, but can't look at one"
        elif not self.allowed_mm_limits["image"]:
            message = "this server takes no pictures in chats: --limit-mm-per-prompt says 0"
        if modality == "image" and message:
            raise BadParameter("image_url", message)
        super().validate_num_items(modality, num_items)

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        # With begin- and end-of-image, as the dummy picture has.
        return {"image": self.sizes.tokens + 2}

    def get_hf_processor(self, **kwargs: object) -> Any:
        return self.processor

    def get_supported_mm_processor_kwargs(self) -> dict[str, set[str]]:
        return {}

    @cached_property
    def sizes(self) -> VisionSizes:
        """Of the vision tower."""
        return vision_sizes(self.ctx.get_hf_config())

    @cached_property
    def processor(self) -> JanusImageProcessorPil:
        """Of the checkpoint."""
        config = self.ctx.model_config
        return image_processor(config.model, config.revision, self.sizes)

    @cached_property
    def replacement(self) -> tuple[list[int], list[int]]:
        """Ids that stand for a picture in a prompt, and what takes their place: tokens, of which the model
        replaces all but the first and the last."""
        tokenizer = self.get_tokenizer()
        boi, eoi = (token_id(tokenizer, token) for token in (BOI, EOI))
        if boi is None or eoi is None:
            missing = BOI if boi is None else EOI
            raise ValueError(
                f"the tokenizer has no token {missing}: {NO_PICTURES} serves the model without it"
            )
        # Some of the older files lack the placeholder: its letters stand for it, and padding fills its place.
        image = token_id(tokenizer, IMAGE)
        target = [image] if image is not None else tokenizer.encode(IMAGE, add_special_tokens=False)
        filler = token_id(tokenizer, PAD) if image is None else image
        assert filler is not None  # check_tokenizer has seen it
        return target, [boi, *[filler] * self.sizes.tokens, eoi]


class DummyPictures(BaseDummyInputsBuilder[PictureInfo]):
    """The largest input, for vLLM's memory profile."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        return IMAGE * mm_counts.get("image", 0)

    def get_dummy_mm_data(
        self, seq_len: int, mm_counts: Mapping[str, int], mm_options: MultiModalDummyOptions
    ) -> Any:
        side = self.info.sizes.image_size
        count = mm_counts.get("image", 0)
        return {"image": self._get_dummy_images(width=side, height=side, num_images=count)}


class PictureProcessor(BaseMultiModalProcessor[PictureInfo]):
    """Pictures -> pixels and prompt ids."""

    def _postprocess_prompt(self, prompt: list[int]) -> list[int]:
        # Chat templates of the transformers layout leave begin-of-sentence to transformers' own processor.
        bos = token_id(self.info.get_tokenizer(), BOS)
        return prompt if bos is None or prompt[:1] == [bos] else [bos, *prompt]

    def _maybe_apply_prompt_updates(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super()._maybe_apply_prompt_updates(*args, **kwargs)
        except AssertionError:  # vLLM has found no place for a picture
            raise BadParameter(
                "prompt", f"there must be one {IMAGE} in the prompt for every picture"
            ) from None

    def _call_hf_processor(
        self, hf_data: Mapping[str, object], hf_kwargs: Mapping[str, object]
    ) -> BatchFeature:
        # Not the request's arguments: another size than the tower's would end the engine.
        if hf_kwargs:
            raise ValueError(
                f"mm_processor_kwargs: this model has none, got {', '.join(map(str, hf_kwargs))}"
            )
        return super()._call_hf_processor(hf_data, hf_kwargs)

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        names = (PIXELS, "image_embeds")
        return {name: MultiModalFieldConfig.batched("image") for name in names if name in hf_inputs}

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, object],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> Sequence[PromptUpdate]:
        target, tokens = self.info.replacement

        def replaced(number: int) -> PromptUpdateDetails:
            boi, filler, *_, eoi = tokens
            images = mm_items.get_items("image", (ImageEmbeddingItems, ImageProcessorItems))
            given = images.get_feature_size(number) if isinstance(images, ImageEmbeddingItems) else None
            full = tokens if given is None else [boi, *[filler] * given, eoi]
            return PromptUpdateDetails.select_token_id(full, filler)

        return [PromptReplacement(modality="image", target=target, replacement=replaced)]
