"""What vLLM's configuration must know of a Janus checkpoint, checked once at start-up."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm import envs
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from vllm_kvcompress import last_word, patches, served
from vllm_kvcompress.config import (
    FP8,
    KEY,
    PROFILED,
    SCHEDULER,
    CompressionConfig,
    is_compressed,
    parse_config,
    pixels_of,
    unread,
)
from vllm_kvcompress.log import logger_for
from vllm_kvcompress.models.checkpoint import READ, check_files
from vllm_kvcompress.models.config import ModelSettings, text_vocab_size
from vllm_kvcompress.models.pictures import check_pictures, looks
from vllm_kvcompress.models.registry import family_of, image_model, knows, serves, store_defaults
from vllm_kvcompress.patches import media
from vllm_kvcompress.policy import AUTO, Raster
from vllm_kvcompress.windows.settings import reserve_places

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

    from vllm_kvcompress.heads.profile import HeadProfile

logger = logger_for(__name__)

ATTENTION_OP = "vllm::kvcompress_attend"
WITHOUT_BACKEND = (
    f"additional_config.{KEY} goes with --attention-backend kvcompress; add it, or drop the settings"
)
REQUEST_TRACKER = "vllm_kvcompress.requests_v1:RequestTracker"


class JanusConfigCheck(VerifyAndUpdateConfig):
    """Called by vLLM while it builds the engine's configuration; raises ValueError in one line."""

    @staticmethod
    def verify_and_update_model_config(model_config: "ModelConfig") -> None:
        if not serves(model_config):
            return
        last_word.listen()
        family = family_of(model_config.hf_config)
        with last_word.heard():
            family.check(model_config.hf_config)
        if family.codes_apart:
            # Image ids come after the text's. vLLM's table goes by model type: it would widen the vocabulary
            # of --model-impl transformers too, whose model has no such ids and must be asked for none.
            codes = model_config.hf_config.vq_config.num_embeddings
            model_config.model_arch_config.vocab_size = text_vocab_size(model_config.hf_config) + codes

    @staticmethod
    @last_word.heard()
    def verify_and_update_config(vllm_config: "VllmConfig") -> None:
        model_config = vllm_config.model_config
        if not serves(model_config):
            return
        vision, load_format = looks(model_config), str(vllm_config.load_config.load_format)
        check_files(Path(model_config.model), model_config.hf_config, load_format, vision)
        config = parse_config(vllm_config.additional_config)  # a misplaced key is an error without it too
        sizes, context = tuple(map(pixels_of, config.sizes or ())), model_config.max_model_len
        settings = ModelSettings(config.pixels, config.default_texts, sizes, context)
        resolve_tokens(model_config, settings)
        check_context(model_config)
        if vision:
            check_pictures(model_config)
        media.apply()
        if vllm_config.speculative_config is not None:
            raise ValueError(
                "speculative decoding does not work with image models: drop --speculative-config"
            )
        if vllm_config.parallel_config.use_ubatching:
            raise ValueError("image models do not run in micro-batches: drop --enable-dbo and --ubatch-size")
        if envs.VLLM_USE_RUST_FRONTEND:
            raise ValueError("VLLM_USE_RUST_FRONTEND: that front end has no images route; unset it")
        if image_model(model_config).aligns and not is_compressed(vllm_config):
            config = use_own_backend(vllm_config, config)
        if not is_compressed(vllm_config) and config.compresses:
            raise ValueError(WITHOUT_BACKEND)
        for line in unread(config):
            logger.info("%s", line)
        if is_compressed(vllm_config):
            profile = check_conflicts(vllm_config, image_model(model_config).rasters)
            if profile is not None:
                check_weights(vllm_config, profile)
            compilation = vllm_config.compilation_config
            if current_platform.is_cuda_alike() and compilation.splitting_ops is None:
                # Piecewise CUDA graphs must not swallow the cache's bookkeeping. vLLM's own operations stay
                # in the list: by them it knows that attention is split off, and piecewise graphs will do.
                compilation.splitting_ops = [*compilation._attention_ops, ATTENTION_OP]
        # Drawing never reads a prefix cache: the unconditional branch of a block depends on the negative
        # prompt. Chats with pictures are long, repeat themselves, and have no use for that branch.
        caches = vision and not is_compressed(vllm_config)
        if vllm_config.cache_config.enable_prefix_caching and not caches:
            vllm_config.cache_config.enable_prefix_caching = False
            logger.info("Prefix caching is off: guidance branches of equal prompts may differ.")
        processors = list(model_config.logits_processors or ())
        if REQUEST_TRACKER not in processors:
            model_config.logits_processors = [*processors, REQUEST_TRACKER]
        if vllm_config.scheduler_config.scheduler_cls is None:
            vllm_config.scheduler_config.scheduler_cls = SCHEDULER
        reserve_places(vllm_config)
        image = image_model(model_config)
        width, height = image.raster.pixel_size
        logger.info(
            "Image model: %d x %d tokens a picture, %d x %d pixels, image ids from %d.",
            image.raster.lines, image.raster.width, width, height, image.first_code,
        )  # fmt: skip
        if image.more_sizes:
            logger.info(
                "Sizes that requests may choose: %s; the first is the default.", ", ".join(image.names)
            )
        served.prepare(vllm_config)
        patches.serve_images_route()


class TransformersCheck(VerifyAndUpdateConfig):
    """Called by vLLM for whatever transformers' implementation serves: the server is vLLM's, not ours."""

    @staticmethod
    def verify_and_update_config(vllm_config: "VllmConfig") -> None:
        """Raise ValueError, one line, for one of our models with settings that are to compress it."""
        given = vllm_config.additional_config
        if isinstance(given, dict) and KEY in given and knows(vllm_config.model_config):
            with last_word.heard():  # what stands beside the section is no matter of ours
                check_unserved(vllm_config, parse_config({KEY: given[KEY]}))


def check_unserved(vllm_config: "VllmConfig", config: CompressionConfig) -> None:
    """`TransformersCheck` of settings that were read."""
    if not config.compresses:
        logger.info("additional_config.%s is not read: --model-impl transformers", KEY)
    elif is_compressed(vllm_config):
        raise ValueError(
            f"additional_config.{KEY} does not work with --model-impl transformers: drop one of the two"
        )
    else:
        raise ValueError(WITHOUT_BACKEND)


def use_own_backend(vllm_config: "VllmConfig", config: CompressionConfig) -> CompressionConfig:
    """Serve with the full cache of our own backend a model whose guidance branches are of unlike length.

    vLLM's backends can't hide a row's first slots from half of its heads. Returns the settings; raises
    ValueError, one line, for settings that want a compressed cache.
    """
    if config.compresses:
        return config  # and the caller refuses them
    given: Any = vllm_config.additional_config or {}
    vllm_config.additional_config = {**given, KEY: {**given.get(KEY, {}), "preset": "full"}}
    vllm_config.attention_config.backend = AttentionBackendEnum.CUSTOM
    logger.info(
        "This model's guidance branches are of unlike length, which vLLM's attention backends can't do: it "
        "runs on --attention-backend kvcompress with preset full, which keeps everything."
    )
    return parse_config(vllm_config.additional_config)


def check_context(model_config: "ModelConfig") -> None:
    """Raise ValueError, one line, where no prompt leaves room for a picture of a size that is served.

    A model that writes has a use for a context without pictures.
    """
    image, context = image_model(model_config), model_config.max_model_len
    for raster, begin in zip(image.rasters, image.begins, strict=True):
        if not image.writes and raster.tokens + len(begin) > context:
            setting = "sizes to smaller ones" if image.more_sizes else "size to a smaller one"
            mend = f"set additional_config.{KEY}.{setting}, or raise" if image.aligns else "raise"
            raise ValueError(
                f"a picture of {raster.name} takes {raster.tokens} tokens, but the context holds "
                f"{context}: {mend} --max-model-len"
            )


def check_conflicts(vllm_config: "VllmConfig", rasters: Sequence[Raster]) -> "HeadProfile | None":
    """Refuse, in one line, what the compressed cache can't be combined with, or not on these grids.

    Returns the head profile that is named, if one is read: its weights are for `check_weights`.
    """
    parallel, cache = vllm_config.parallel_config, vllm_config.cache_config
    dtype = str(vllm_config.model_config.dtype).removeprefix("torch.")
    config = parse_config(vllm_config.additional_config)
    for raster in rasters:
        try:
            config.policy.check(raster)
        except ValueError as error:
            of_which = f", of pictures of {raster.name}" if len(rasters) > 1 else ""
            raise ValueError(f"{error}{of_which}") from None
    text = vllm_config.model_config.hf_config.get_text_config()
    kv_heads, profile = text.num_key_value_heads, None
    if config.head_profile != AUTO and config.policy.types in PROFILED:
        from vllm_kvcompress.heads.profile import HeadProfile  # where such a model is served, not before

        profile = HeadProfile.load(config.head_profile)
        profile.check_model("", "", text.num_hidden_layers, kv_heads)  # its hash: `check_weights`
        if config.policy.types == "fitted":
            profile.loss_curves.check_grid(rasters[0])
    refused = (
        (
            kv_heads % parallel.tensor_parallel_size > 0,
            f"--tensor-parallel-size {parallel.tensor_parallel_size} and {kv_heads} KV heads: every rank "
            f"needs as many; set it to a divisor of {kv_heads}",
        ),
        (parallel.pipeline_parallel_size > 1, "pipeline parallelism: set --pipeline-parallel-size 1"),
        (
            max(parallel.decode_context_parallel_size, parallel.prefill_context_parallel_size) > 1,
            "context parallelism: set both context-parallel sizes to 1",
        ),
        (vllm_config.kv_transfer_config is not None, "KV connectors: drop --kv-transfer-config"),
        (
            cache.cache_dtype not in ("auto", dtype, *FP8),
            f"a KV cache of {cache.cache_dtype}: set --kv-cache-dtype auto or fp8",
        ),
        (
            cache.cache_dtype in FP8
            and current_platform.is_cuda()
            and not current_platform.has_device_capability(89),
            "--kv-cache-dtype fp8 on this GPU, which lacks e4m3 (compute capability 8.9): set auto",
        ),
        (vllm_config.lora_config is not None, "LoRA: drop --enable-lora"),
        (
            vllm_config.scheduler_config.disable_hybrid_kv_cache_manager,
            "a single KV-cache group: drop --disable-hybrid-kv-cache-manager",
        ),
        (
            # Another one does not ask whether a request fits: a long text would be written past its blocks.
            vllm_config.scheduler_config.scheduler_cls not in (None, SCHEDULER),
            f"another scheduler ({vllm_config.scheduler_config.scheduler_cls!s:.200}): drop --scheduler-cls",
        ),
    )
    for clash, mend in refused:
        if clash:
            raise ValueError(f"--attention-backend kvcompress does not work with {mend}")
    return profile


def check_weights(vllm_config: "VllmConfig", profile: "HeadProfile") -> None:
    """Refuse, in one line, a head profile of other weights than those on the disk.

    Where that can't be told yet (a model to be downloaded, pickled weights), it is when they are loaded.
    """
    if str(vllm_config.load_config.load_format) not in READ:
        return
    from vllm_kvcompress.models.stored import stored_fingerprint

    model = vllm_config.model_config
    mark = stored_fingerprint(model.model, model.revision, model.hf_config)
    profile.check_model("", mark, profile.layers, profile.kv_heads)


def resolve_tokens(model_config: "ModelConfig", settings: ModelSettings) -> None:
    """Have the family look at the checkpoint's tokenizer, and read generation_config.json's defaults.

    ``--override-generation-config`` goes before the file, as it does in vLLM's own defaults.
    """
    from vllm.tokenizers import get_tokenizer

    from vllm_kvcompress.rows import MAX_SCALE

    tokenizer = get_tokenizer(
        model_config.tokenizer or model_config.model,
        tokenizer_mode=model_config.tokenizer_mode,
        trust_remote_code=model_config.trust_remote_code,
        revision=model_config.tokenizer_revision,
    )
    family_of(model_config.hf_config).resolve(model_config.hf_config, tokenizer, settings)
    defaults: dict[str, Any] = {}
    override = model_config.override_generation_config
    generation = model_config.try_get_generation_config() | override
    # transformers' own fields; small models are at their best well below Janus-Pro's guidance of 5.
    scale, top_k = generation.get("guidance_scale"), generation.get("top_k")
    if scale is not None:
        if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 <= scale <= MAX_SCALE:
            raise ValueError(
                f"{_said_by('guidance_scale', override)}: guidance_scale {scale!r:.40} is not a number "
                f"from 0 to {MAX_SCALE:g}"
            )
        defaults["guidance_scale"] = float(scale)
    if top_k is not None:
        if type(top_k) is not int or not -1 <= top_k < 2**31:
            raise ValueError(
                f"{_said_by('top_k', override)}: top_k {top_k!r:.40} is not a number from -1 to 2**31 - 1"
            )
        defaults["top_k"] = max(top_k, 0)
    # As vLLM's front ends read it, once: they fill it in, and a picture is no shorter for it.
    store_defaults(model_config.hf_config, defaults, model_config.get_diff_sampling_param().get("max_tokens"))


def _said_by(field: str, override: dict[str, Any]) -> str:
    """Where a default of generation comes from, for an error."""
    return "override_generation_config" if field in override else "generation_config.json"
