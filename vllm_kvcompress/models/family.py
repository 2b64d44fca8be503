"""A family of image models: what the rest of the package asks of it, and nothing else.

One object per family, found by ``model_type`` (`vllm_kvcompress.models.registry.family_of`). What a family is
to the engine once it runs is data, an `ImageModel`. docs/models.md says in one page how to add one.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

    from vllm_kvcompress.models.config import ImageModel, ModelSettings
    from vllm_kvcompress.models.vq import PictureDecoder
    from vllm_kvcompress.policy.raster import Raster


class Family(Protocol):
    """See the module. ``tokenizer`` is always what ``vllm.tokenizers.get_tokenizer`` gives."""

    name: ClassVar[str]
    """As messages call its checkpoints."""

    sentences: ClassVar[bool]
    """Whether a prompt may be any sentence, as the prompts of an evaluation are."""

    codes_apart: ClassVar[bool]
    """Whether codes have ids behind the text's vocabulary, rather than in it."""

    def check(self, hf_config: "PreTrainedConfig") -> None:
        """Raise ValueError, one line, on a config.json that is not the family's, or beyond reason."""

    def canonical_name(self, name: str) -> str | None:
        """This package's name of a checkpoint's tensor; None if knowingly skipped.

        Those of the picture decoder come back with ``model.vqmodel.`` or ``gen_vision_model.`` in front.
        """

    def shapes(self, hf_config: "PreTrainedConfig") -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor that a checkpoint must hold, the VQ decoder's aside."""

    def decoder(
        self, hf_config: "PreTrainedConfig", raster: "Raster", dtype: "torch.dtype | None" = None
    ) -> "PictureDecoder":
        """What turns codes into pixels, on torch's default device, its weights not loaded."""

    def resolve(self, hf_config: "PreTrainedConfig", tokenizer: Any, settings: "ModelSettings") -> None:
        """At start-up: check the tokenizer, and keep with the configuration what ``describe`` needs of it.

        ``settings`` are the operator's. Raises ValueError, one line.
        """

    def describe(self, hf_config: "PreTrainedConfig", defaults: Mapping[str, Any]) -> "ImageModel":
        """What serving needs to know, in every process.

        ``defaults`` has ``guidance_scale`` and ``top_k`` where generation_config.json says them.
        """

    def prompt_ids(self, tokenizer: Any, model: "ImageModel", text: str) -> list[int]:
        """Prompt ids for drawing ``text``. Raises ValueError, one line, if there are none.

        This, and what follows, is asked of ``model`` with one size (`ImageModel.of`): a picture's own.
        """

    def negative_ids(self, tokenizer: Any, model: "ImageModel", text: str, length: int) -> list[int]:
        """The unconditional branch's prompt, of exactly ``length`` ids, for what the user does not want.

        Raises ValueError, one line, if it does not fit.
        """

    def lengthened(self, model: "ImageModel", prompt_ids: list[int], length: int) -> list[int]:
        """A prompt made as long as a longer negative one.

        Both branches of a token share its position. No more than there are leaves the prompt as it is.
        """

    def calibration_ids(self, tokenizer: Any, model: "ImageModel", prompt: int | str) -> list[int]:
        """The prompt of a picture that heads are measured on: a text, or the built-in one of that number.

        Of a model that aligns its branches at least as long as the model's own negative prompt. Raises
        ValueError, one line, for a text that `prompt_ids` refuses.
        """


class JanusLike:
    """What families with Janus's configuration, VQ decoder and names have in common."""

    codes_apart: ClassVar[bool] = True

    def check(self, hf_config: "PreTrainedConfig") -> None:
        from vllm_kvcompress.models.checkpoint import check_checkpoint

        check_checkpoint(hf_config)

    def canonical_name(self, name: str) -> str | None:
        from vllm_kvcompress.models.weights import canonical_name

        return canonical_name(name)

    def decoder(
        self, hf_config: "PreTrainedConfig", raster: "Raster", dtype: "torch.dtype | None" = None
    ) -> "PictureDecoder":
        from vllm_kvcompress.models.vq import VQDecoder

        return VQDecoder(hf_config.vq_config, raster, dtype)

    def one_size(self, hf_config: "PreTrainedConfig", settings: "ModelSettings") -> None:
        """Raise ValueError, one line, if another size than the checkpoint's is set."""
        from vllm_kvcompress.models.config import raster_of

        raster = raster_of(hf_config)
        if settings.named not in ((), (raster.pixel_size,)):
            setting = "sizes" if settings.sizes else "size"
            raise ValueError(
                f"additional_config.kvcompress.{setting}: this model draws {raster.name} only; leave it out"
            )
