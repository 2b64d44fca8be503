"""``--additional-config '{"kvcompress": {...}}'``: one frozen model, unknown keys refused."""

import difflib
import re
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vllm_kvcompress.policy import AUTO, MAX_TYPES, PRESETS, TOLERANCE, HeadTypes, Policy, Score

if TYPE_CHECKING:
    from vllm.config import VllmConfig

KEY = "kvcompress"
BACKEND = "kvcompress"
SCHEDULER = "vllm_kvcompress.scheduler.ImageScheduler"
Choice = Literal["auto", "torch", "cpu", "triton"]  # of kernels
PROFILED = ("profile", "fitted")  # where head types come from in presets that need a head profile
FP8 = ("fp8", "fp8_e4m3")  # vLLM's names of an 8-bit cache of e4m3 numbers
MAX_WINDOW = 16  # places of a row in one step: lanes of a GPU kernel's matrix unit
WITH_ANY_CACHE = frozenset(
    {"window", "window_rows", "limits", "strict", "playground", "size", "sizes", "default_texts"}
)  # settings that do not need the backend
_POLICY_FIELDS = frozenset(Policy.__dataclass_fields__)
_OF_EVICTION = sorted(_POLICY_FIELDS - {"preset", "budget", "head_types"})
MOST_SIZES = 64  # that one server draws
Size = Annotated[str, Field(pattern=r"^[1-9]\d{0,4}x[1-9]\d{0,4}$")]


class Limits(BaseModel):
    """What a server takes of a request, whatever its cache; more is refused.

    Parameters
    ----------
    prompt_tokens : int
        Of a picture's prompt; it stays in the cache while the picture is drawn.
    pictures : int
        That one request of the text routes may ask for (``n``); the images route has its own, 10.
    body_bytes : int
        Of an HTTP request to the images route; two prompts of 32,000 escaped characters take 768 KiB.
    body_seconds : float
        Until such a body must be there: no client holds a connection for ever.
    request_id : int
        Characters of ``X-Request-Id`` that the images route keeps.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    prompt_tokens: int = Field(default=1024, ge=1)
    pictures: int = Field(default=64, ge=1)
    body_bytes: int = Field(default=2**20, ge=1024)
    body_seconds: float = Field(default=60, gt=0, allow_inf_nan=False)
    request_id: int = Field(default=128, ge=16, le=4096)


class CompressionConfig(BaseModel):
    """How a kvcompress server compresses; every field has a default.

    The fields that ``vllm_kvcompress.policy.Policy`` has too mean what they mean there.

    Parameters
    ----------
    max_types : int
        Under `fitted`: head types at most, 1 to 6.
    tolerance : float
        With ``budget: auto``: the predicted loss that is still accepted, see docs/quality.md.
    head_profile : str
        Path of a head profile, or ``auto``: the model's own beside its weights, else the user's cache
        directory, calibrated at start-up if the profile isn't there yet. Used by presets that tell heads
        from one another.
    threshold : float, optional
        Locality threshold, in [0, 1], above which a head is semantic; None takes the profile's.
    recalibrate : bool
        With ``head_profile: auto``, measure the heads again even if a profile is there, the model's own too.
    window : int or str
        Places that a picture may have in a step, its last token and the drafts after it: 1 draws one token a
        step, ``auto`` takes what pays. Goes with a full cache too.
    window_rows : int
        Pictures at once beyond which windows are off.
    kernels : str
        ``auto``, or one implementation: ``torch`` (the reference), ``cpu`` (compiled) or ``triton`` (GPUs).
    limits : Limits
        What a request may ask for; also without ``--attention-backend kvcompress``.
    strict : bool
        Whether the images route refuses what it can't give (another size, a quality) instead of noting it.
    playground : bool
        Whether ``/playground`` is a page to draw with.
    size : str, optional
        Of all pictures, ``WIDTHxHEIGHT`` in pixels, for models that draw more than one.
    sizes : list of str, optional
        Those that requests may choose from, the default first; None takes the model's own list.
    default_texts : bool
        Whether requests that say nothing else have the model's own texts: what it adds to a prompt, and its
        negative prompt.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    preset: str = "fitted"
    budget: float | Literal["auto"] = 0.2
    spatial_tokens: int | None = None
    anchor_tokens: int | None = None
    recent_tokens: int | None = None
    score: Score | None = None
    head_types: HeadTypes | None = None
    value_norm: bool | None = None
    smooth_row: bool | None = None
    stratify: bool | None = None
    max_types: int = Field(default=MAX_TYPES, ge=1, le=MAX_TYPES)
    tolerance: float = Field(default=TOLERANCE, gt=0, allow_inf_nan=False)
    head_profile: str = "auto"
    threshold: float | None = Field(default=None, ge=0, le=1)
    recalibrate: bool = False
    window: Annotated[int, Field(ge=1, le=MAX_WINDOW)] | Literal["auto"] = AUTO
    window_rows: int = Field(default=32, ge=1)
    kernels: Choice = "auto"
    limits: Limits = Limits()
    strict: bool = False
    playground: bool = False
    size: Size | None = None
    sizes: Annotated[list[Size], Field(min_length=1, max_length=MOST_SIZES)] | None = None
    default_texts: bool = True

    @property
    def pixels(self) -> tuple[int, int] | None:
        """``size`` as width and height."""
        return None if self.size is None else pixels_of(self.size)

    @property
    def compresses(self) -> bool:
        """Whether anything was set that is about the cache, be it to the default."""
        return bool(self.model_fields_set - WITH_ANY_CACHE)

    @property
    def policy(self) -> Policy:
        """The point in the policy space. Raises ValueError naming the field."""
        return Policy(**{name: getattr(self, name) for name in _POLICY_FIELDS})


def pixels_of(size: str) -> tuple[int, int]:
    """``WIDTHxHEIGHT`` as two numbers."""
    width, height = size.split("x")
    return int(width), int(height)


def parse_config(additional_config: Any) -> CompressionConfig:
    """Read the ``kvcompress`` section of vLLM's additional config.

    Raises
    ------
    ValueError
        One line naming the key and the mend.
    """
    given = additional_config if isinstance(additional_config, dict) else {}
    for name, value in given.items():
        if (setting := _SETTINGS.get(_plain(name))) is not None:
            raise ValueError(f"additional_config has {name!r} beside {KEY}; write {_written(setting)}")
        if name != KEY and _is_misspelt(name, value):
            raise ValueError(f"additional_config has {name!r} beside {KEY}; did you mean {KEY}?")
    section = given.get(KEY, {})
    if not isinstance(section, dict):
        raise ValueError(f"additional_config.{KEY} must be an object of settings, got {section!r}")
    try:
        config = CompressionConfig(**section)
    except ValidationError as error:
        raise ValueError(_one_line(error)) from None
    for wrong, mend in (
        (config.size and config.sizes, "size draws one size alone: leave one of the two out"),
        (len(set(config.sizes or ())) < len(config.sizes or ()), "a size is there twice; leave one out"),
    ):
        if wrong:
            raise ValueError(f"additional_config.{KEY}.sizes: {mend}")
    policy = config.policy  # raises on a value out of range
    _check_profile(config, policy.types)
    for name in ("max_types", "tolerance"):
        if name in section and (policy.types != "fitted" or (name == "tolerance" and policy.budget != AUTO)):
            where = "budget auto" if policy.types == "fitted" else "preset fitted"
            raise ValueError(f"additional_config.{KEY}.{name}: goes with {where} only; leave it out")
    return config


def unread(config: CompressionConfig) -> list[str]:
    """What was set and has no effect beside the other settings: a line for each.

    No errors: a comparison of presets gives all of them one section.
    """
    preset, types = config.preset, config.policy.types
    given = {
        n for n in config.model_fields_set if (value := getattr(config, n)) is not None and value is not False
    }
    reasons = []
    if config.head_profile != AUTO and types not in PROFILED:
        reasons.append(("head_profile", f"preset {preset} needs none"))
    if types not in PROFILED:
        reasons += [(name, f"preset {preset} needs no head profile") for name in ("threshold", "recalibrate")]
    if not PRESETS[preset].evicts and config.budget != 1:
        reasons.append(("budget", f"preset {preset} keeps everything"))
    if not PRESETS[preset].evicts:
        reasons += [(name, f"preset {preset} keeps everything") for name in _OF_EVICTION]
    if config.window == 1:
        reasons.append(("window_rows", "window 1 draws one token a step"))
    return [f"{name} is not read: {reason}" for name, reason in reasons if name in given]


def _written(name: str) -> str:
    """A setting in its place."""
    path = (KEY, name) if name in CompressionConfig.model_fields else (KEY, "limits", name)
    return "".join(f'{{"{part}": ' for part in path) + "..." + "}" * len(path)


def _check_profile(config: CompressionConfig, types: HeadTypes) -> None:
    """Raise ValueError, one line, for settings of head profiles that contradict the others.

    One that the preset merely has no use for is none: a comparison of presets gives all of them one profile.
    """
    for name, is_wrong, mend in (
        ("threshold", config.threshold is not None and types == "fitted",
         "preset fitted has no locality threshold; leave it out, or set preset to decoupled"),
        ("recalibrate", config.recalibrate and config.head_profile != AUTO,
         "the file that head_profile names is taken as it is; leave one of the two out"),
    ):  # fmt: skip
        if is_wrong:
            raise ValueError(f"additional_config.{KEY}.{name}: {mend}")


def _plain(name: Any) -> str:
    """A key without its case, dashes and underscores."""
    return re.sub(r"[-_\s]", "", str(name).lower())


_SETTINGS = {_plain(name): name for name in (*Limits.model_fields, *CompressionConfig.model_fields)}


def _is_misspelt(name: Any, value: Any) -> bool:
    """Whether a key is meant to be ours; other packages' may speak of compression too.

    Theirs are told by what is in them: a section in which all is called as ours is.
    """
    word = _plain(name).removeprefix("vllm")
    ours = isinstance(value, dict) and bool(value) and {_plain(one) for one in value} <= _SETTINGS.keys()
    close = difflib.get_close_matches(word, [KEY], cutoff=0.75 if ours else 0.85)
    return bool(close) and (ours or word.startswith("kv"))


def _one_line(error: ValidationError) -> str:
    first, *more = error.errors()
    *section, name = (str(part) for part in first["loc"])
    if section and section != ["limits"]:
        section, name = [], section[0]  # the rest names a member of a union, or a place in a list
    where = ".".join((KEY, *section))
    if first["type"] == "extra_forbidden":
        known = (Limits if section else CompressionConfig).model_fields
        close = difflib.get_close_matches(name, known, n=1)
        mend = f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"
        if not section and name in Limits.model_fields:
            mend = f"write {_written(name)}"
        return f"additional_config.{where} has no setting {name!r}; {mend}"
    message = first["msg"].lower()
    if more and more[0]["type"] == "literal_error" and more[0]["loc"][0] == name:  # a number, or a word
        message += f" or {more[0]['ctx']['expected']}"
    return f"additional_config.{where}.{name}: {message}, got {first['input']!r}"


def is_compressed(vllm_config: "VllmConfig") -> bool:
    """Whether the engine was started with ``--attention-backend kvcompress``."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    return vllm_config.attention_config.backend is AttentionBackendEnum.CUSTOM
