"""What the engine knows of an image model, read into one description whatever its config.json looks like."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from vllm_kvcompress.policy.raster import Raster


@dataclass(frozen=True)
class ModelSettings:
    """What the operator decides about the model itself.

    Parameters
    ----------
    size : (int, int) or None
        Width and height of all pictures in pixels; None is the model's own, or ``sizes``.
    default_texts : bool
        Whether requests that say nothing else have the model's own texts.
    sizes : tuple of (int, int)
        Of pictures, the default first; empty where the operator names none.
    context : int or None
        Tokens of prompt and picture (``--max-model-len``): sizes that the operator has not named are left out
        where they do not fit.
    """

    size: tuple[int, int] | None = None
    default_texts: bool = True
    sizes: tuple[tuple[int, int], ...] = ()
    context: int | None = None

    @property
    def named(self) -> tuple[tuple[int, int], ...]:
        """The sizes that the operator names, by either setting."""
        return self.sizes if self.size is None else (self.size,)


class PictureSize(NamedTuple):
    """A size that a model draws.

    Parameters
    ----------
    raster : Raster
        The picture's token grid.
    grid_ids : tuple of int
        Ids between begin-of-image and the first code, the same in every prompt for it: they say the grid.
    """

    raster: Raster
    grid_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class ImageModel:
    """What serving an autoregressive image model needs to know about it.

    There is one id space for prompts and drawn tokens; ids of codes are ``first_code + code``.

    Parameters
    ----------
    raster : Raster
        The picture's token grid; the default one, where there are more sizes.
    text_vocab, codes : int
        Sizes of the tokenizer's vocabulary and of the image codebook.
    bos, pad, boi : int
        Text ids of begin-of-sentence, padding and begin-of-image. Families differ, so they come
        from the checkpoint's tokenizer. -1 where there is no such id.
    guidance_scale : float
        Default classifier-free guidance scale: the checkpoint's generation_config.json's, or
        Janus-Pro's 5.
    top_k : int
        Default of the images route: generation_config.json's, or 0, all codes.
    classes : int
        Of a class-conditional model, whose prompts are one class id below this (and whose ``pad``, for the
        unconditional branch, is the null class); 0 in others, whose prompts end in begin-of-image.
    first_code : int
        Id of the first code; by default the text's vocabulary ends there. Otherwise codes are ids of it.
    eol : int
        Id of the end-of-line token that every line of the raster ends in, no code's id; -1 without.
    grid_ids : tuple of int
        Ids between begin-of-image and the first code, the same in every prompt for ``raster``.
    writes : bool
        Whether it answers with text where a prompt asks for no picture.
    negative : tuple of int
        Of a model whose unconditional branch is a prompt of its own, of any length: the one that it has where
        a request says none. Then the branches' prompts end together and the shorter one is filled up with
        ``pad`` at its beginning, which nothing sees: `aligned`. Empty in others.
    suffix, negative_text : str
        The model's own texts: what the images route adds to a prompt, and the negative prompt where a request
        has none; the request can do without (``default_texts``).
    more_sizes : tuple of PictureSize
        What it draws beside ``raster``. A size is known by its place in `sizes`.
    """

    raster: Raster
    text_vocab: int
    codes: int
    bos: int
    pad: int
    boi: int
    guidance_scale: float = 5.0
    top_k: int = 0
    classes: int = 0
    first_code: int = -1
    eol: int = -1
    grid_ids: tuple[int, ...] = ()
    writes: bool = True
    negative: tuple[int, ...] = ()
    suffix: str = ""
    negative_text: str = ""
    more_sizes: tuple[PictureSize, ...] = ()

    def __post_init__(self) -> None:
        if self.first_code < 0:
            object.__setattr__(self, "first_code", self.text_vocab)
        for raster in self.rasters:
            if (self.eol >= 0) != bool(raster.ends):
                raise ValueError(f"eol: id {self.eol} with {raster.ends} end-of-line tokens a line")
        if len(set(self.begins)) < len(self.begins):
            raise ValueError("more_sizes: two sizes whose prompts end in the same ids")

    @cached_property
    def sizes(self) -> tuple[PictureSize, ...]:
        """What it draws, the default first."""
        return PictureSize(self.raster, self.grid_ids), *self.more_sizes

    @property
    def rasters(self) -> tuple[Raster, ...]:
        """The grids of `sizes`."""
        return tuple(size.raster for size in self.sizes)

    @property
    def names(self) -> tuple[str, ...]:
        """``WIDTHxHEIGHT`` of `sizes`."""
        return tuple(raster.name for raster in self.rasters)

    def of(self, size: int) -> "ImageModel":
        """The same model as one that draws this size alone: its grid, prompts and negative prompt."""
        if not self.more_sizes:
            return self
        raster, grid_ids = self.sizes[size]
        negative = self.negative and (*self.negative[: -len(self.begin)], *self.begins[size])
        return replace(self, raster=raster, grid_ids=grid_ids, negative=negative, more_sizes=())

    @property
    def aligns(self) -> bool:
        """Whether prompts of the two branches may be of unlike length."""
        return bool(self.negative)

    def aligned(self, ids: Sequence[int], length: int) -> list[int]:
        """A prompt filled up at its beginning to at least ``length`` ids."""
        return [*[self.pad] * (length - len(ids)), *ids]

    def padding(self, ids: Sequence[int]) -> int:
        """How many ids at a prompt's beginning only fill it up."""
        return next((n for n, one in enumerate(ids) if one != self.pad), len(ids)) if self.aligns else 0

    @property
    def vocab(self) -> int:
        """Size of the one id space."""
        return max(self.text_vocab, self.first_code + self.codes)

    @property
    def choices(self) -> int:
        """What an image token is drawn from: the codes, then the end of a line where there is one."""
        return self.codes + self.raster.ends

    @property
    def begin(self) -> tuple[int, ...]:
        """The ids that a prompt for the default size ends in; of no use where prompts are classes."""
        return (self.boi, *self.grid_ids)

    @cached_property
    def begins(self) -> tuple[tuple[int, ...], ...]:
        """`begin` of each of `sizes`."""
        return tuple((self.boi, *size.grid_ids) for size in self.sizes)

    def size_of(self, ids: Sequence[int], prefix: int) -> int | None:
        """Which of `sizes` a prompt asks for: its ``prefix`` ends in the size's ids, or is a class.

        None of a prompt that asks for no picture, or for one of a size that is not served.
        """
        if self.classes:
            return 0 if prefix == 1 and 0 <= ids[0] < self.classes else None
        for size, begin in enumerate(self.begins):
            if tuple(ids[max(0, prefix - len(begin)) : prefix]) == begin:
                return size
        return None

    def is_begun(self, ids: Sequence[int], prefix: int) -> bool:
        """Whether a prompt asks for a picture, as `size_of` has it."""
        return self.size_of(ids, prefix) is not None

    def prefix_length(self, prompt_ids: Sequence[int]) -> int:
        """Tokens of a prompt before the image tokens at its end."""
        end = len(prompt_ids)
        while end and self.is_drawn(prompt_ids[end - 1]):
            end -= 1
        return end

    def draws(self, ids: Tensor) -> Tensor:
        """``[tokens]`` ids -> bool: after which of them a code comes, if the prompt asks for a picture."""
        if self.classes:
            return ids.new_ones(ids.shape, dtype=torch.bool)
        drawing = self.is_drawn(ids)
        for last in {begin[-1] for begin in self.begins}:
            drawing = drawing | (ids == last)
        return drawing

    @overload
    def is_drawn(self, ids: int) -> bool: ...

    @overload
    def is_drawn(self, ids: Tensor) -> Tensor: ...

    def is_drawn(self, ids: Any) -> Any:
        """Which ids are image tokens: codes, or the end of a line."""
        code = (ids >= self.first_code) & (ids < self.first_code + self.codes)
        return code | (ids == self.eol) if self.eol >= 0 else code

    def code(self, token_id: int) -> int:
        """Codebook index of a code's id."""
        return token_id - self.first_code

    def ids(self, choices: Tensor) -> Tensor:
        """Ids of numbers below `choices`, any shape."""
        ids = choices + self.first_code
        return torch.where(choices == self.codes, self.eol, ids) if self.eol >= 0 else ids

    def among(self, logits: Tensor) -> Tensor:
        """Of logits ``[n, vocab]``, or ``[n, choices]``, those of image tokens: the latter, maybe a view."""
        if logits.shape[-1] == self.choices:
            return logits
        codes = logits[:, self.first_code : self.first_code + self.codes]
        return torch.cat([codes, logits[:, self.eol, None]], -1) if self.eol >= 0 else codes

    def tokens(self, codes: Sequence[int]) -> list[int]:
        """The ids of a picture on ``raster``, ends of lines in place, from its codes in raster order."""
        ids, columns = [self.first_code + code for code in codes], self.raster.columns
        if self.eol < 0:
            return ids
        lines = [ids[at : at + columns] for at in range(0, len(ids), columns)]
        return [one for line in lines for one in (*line, self.eol)]

    def ends(self, tokens: Tensor, width: Tensor | int | None = None) -> Tensor:
        """Which tokens of pictures, counted from 0, are ends of lines; negative ones never are.

        ``width`` is the tokens of a line, of all or ``[tokens]`` of each; by default as ``raster`` has it.
        """
        width = self.raster.width if width is None else width
        return (tokens >= 0) & (tokens % width >= width - self.raster.ends)


def text_vocab_size(hf_config: PreTrainedConfig) -> int:
    """Ids below this are text."""
    return hf_config.get_text_config().vocab_size


def patch_of(hf_config: PreTrainedConfig) -> int:
    """Pixels on a side of what a token stands for: all resolutions of the VQ decoder but one double it."""
    patch: int = 2 ** (len(hf_config.vq_config.channel_multiplier) - 1)
    return patch


def raster_of(hf_config: PreTrainedConfig) -> Raster:
    """The token grid of the pictures of a JanusConfig or MultiModalityConfig."""
    vq = hf_config.vq_config
    return Raster(vq.num_patches, vq.num_patches, patch=patch_of(hf_config))


def head_size(text: PreTrainedConfig) -> int:
    """Channels of an attention head, of a decoder's configuration."""
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def cached_head_size(text: PreTrainedConfig) -> int:
    """The same as the KV cache holds it: more where attention kernels do not take the head's own size."""
    return getattr(text, "cached_head_size", None) or head_size(text)
