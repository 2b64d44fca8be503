"""Worker methods that the front end calls with ``collective_rpc(name)``."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from vllm_kvcompress.log import logger_for

if TYPE_CHECKING:
    from vllm_kvcompress.models.vq import PictureDecoder

logger = logger_for(__name__)


def kvcompress_decode_image(self: Any, codes: list[int], size: int = 0) -> tuple[int, int, bytes] | None:
    """Pixels of the lines drawn so far.

    Parameters
    ----------
    codes : list of int
        Codebook indices of whole lines, from the first.
    size : int
        Which of the model's sizes the picture has.

    Returns
    -------
    (width, height, bytes) or None
        RGB, 8 bits, row by row, of ``height = lines * patch`` pixel rows; None on all workers but the
        first (the weights are there on each, but one picture needs one decoder).
    """
    if self.rank != 0:
        return None
    model = self.model_runner.get_model()
    decoder: PictureDecoder = model.vq
    return decoder.picture(codes, model.image.sizes[size].raster)


def kvcompress_decode_images(
    self: Any, pictures: list[tuple[list[int], int]]
) -> list[tuple[int, int, bytes]] | None:
    """``kvcompress_decode_image`` of several pictures, codes and size of each, in order.

    One after the other: in a batch a picture's pixels come out up to a dozen levels different in bfloat16,
    and by one in float32, and the same seed is to draw the same file in any company.
    """
    decoded = (kvcompress_decode_image(self, *picture) for picture in pictures)
    logger.debug("Decoding %d pictures on rank %d", len(pictures), self.rank)
    return None if self.rank != 0 else [pixels for pixels in decoded if pixels is not None]


def kvcompress_decoder_weights(self: Any) -> bytes | None:
    """The picture decoder's tensors as a safetensors file; None on all workers but the first."""
    if self.rank != 0:
        return None
    from safetensors.torch import save

    state = self.model_runner.get_model().vq.state_dict()
    return save({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()})


def kvcompress_calibrate(self: Any, prompts: Sequence[str] | None = None, lines: int = 0) -> str:
    """The head profile that is measured anew, as JSON.

    Parameters
    ----------
    prompts : sequence of str, optional
        The user's, instead of the built-in ones.
    lines : int
        Of the neighbourhood that locality scores are measured with; 0: the default.

    Raises ValueError, one line, for a prompt that the model can't draw.
    """
    from vllm_kvcompress.models.calibration import NEIGHBOURHOOD_LINES, calibrate

    model = self.model_runner.get_model()
    return calibrate(self.vllm_config, model, lines or NEIGHBOURHOOD_LINES, prompts).model_dump_json()


def kvcompress_head_profile(
    self: Any, budgets: Sequence[float | Literal["auto"]] = (), source: str = ""
) -> str | None:
    """The head profile that the cache was planned with, as JSON; None if the preset needs none.

    It is read where start-up took it from, or left it.

    Parameters
    ----------
    budgets : sequence
        Fits are tried for these: shares of the picture, or ``auto``.
    source : str
        Another profile's file instead.

    Raises ValueError, one line, for a budget that no fit meets.
    """
    from vllm_kvcompress.config import PROFILED, CompressionConfig, parse_config
    from vllm_kvcompress.models.calibration import shape_of
    from vllm_kvcompress.models.compression import pages_of, profile_of, wanted_of
    from vllm_kvcompress.models.ranks import Ranks

    config = parse_config(self.vllm_config.additional_config)
    if config.policy.types not in PROFILED and not source:
        return None
    own = not config.recalibrate  # what was measured anew is in the cache, not beside the weights
    config = config.model_copy(update={"recalibrate": False, "head_profile": source or config.head_profile})
    model = self.model_runner.get_model()
    served = [CompressionConfig(budget=budget, max_types=config.max_types) for budget in budgets]
    pages, ranks = pages_of(shape_of(model), model.dtype), Ranks.of_engine().number
    wanted = [wanted_of(one, model.image.raster, pages, ranks) for one in served]
    return profile_of(config, self.vllm_config, model, wanted, own).model_dump_json()


def kvcompress_kept(
    self: Any, request_id: str, prefix: int, size: int = 0
) -> tuple[int, list[tuple[str, int, list[int]]]] | None:
    """What the cache holds of a running picture: `cache.kept.kept_tokens`, as plain tuples, on each rank."""
    from vllm_kvcompress.cache.kept import kept_tokens

    found = kept_tokens(self.model_runner, request_id, prefix, size)
    if found is None:
        return None
    drawn, types = found
    return drawn, [(kept.name, kept.heads, kept.counts) for kept in types]


METHODS = (
    kvcompress_decode_image, kvcompress_decode_images, kvcompress_decoder_weights, kvcompress_calibrate,
    kvcompress_head_profile, kvcompress_kept,
)  # fmt: skip
