"""Head profile: what was measured of a model's heads (a JSON file), from which any budget is fitted.

Format 2 holds loss curves (`vllm_kvcompress.heads.curves`), the pictures that they were measured on, what
fits cost there (`vllm_kvcompress.heads.tried`), and SSD's locality scores
(https://arxiv.org/abs/2510.18716; docs/design.md, "The method", point 9). Format 1 had the scores only: it is
read as what it is, and will do for presets that split heads by locality.
"""

import json
import os
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from vllm_kvcompress.heads.curves import LossCurves
from vllm_kvcompress.heads.tried import Trial, Wanted


class HeadProfile(BaseModel):
    """What was measured of the KV heads of one model.

    Parameters
    ----------
    format : int
        2, or 1 for a file without ``curves``.
    model : str
        Name of the model that was calibrated.
    model_hash : str
        Fingerprint of its weights or config, whatever the calibration took.
    metric : str
        Name of the metric behind ``scores``.
    threshold : float
        A head scoring above it is semantic, the others are spatial; in [0, 1].
    prompts_hash : str
        Fingerprint of the prompts that were drawn.
    neighbourhood : int
        Image tokens before the query, in raster order, that count as near.
    layers, kv_heads : int
        Geometry of the model.
    scores : list of list of float
        [layers][kv_heads] attention mass outside the neighbourhood, in [0, 1].
    head_size : int, optional
        Numbers per key; with ``dtype`` it says what a slot costs.
    dtype : str, optional
        Of K and V, torch's name.
    guidance : float, optional
        Scale that the pictures were drawn and the heads measured with; None in a file of before it was noted.
    curves : dict, optional
        `LossCurves.dump`.
    prompts : list of list of int, optional
        [prompts][tokens] ids of the user's own prompts (``calibrate --prompts``); None: the built-in ones.
    pictures : list of list of int, optional
        [prompts][image tokens] ids that calibration drew: fits are tried on them.
    trials : list of Trial
        What was tried already.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    format: int = Field(default=1, ge=1, le=2)
    model: str
    model_hash: str
    metric: str
    threshold: float = Field(ge=0, le=1, allow_inf_nan=False)
    prompts_hash: str
    neighbourhood: int = Field(ge=1)
    layers: int = Field(ge=1)
    kv_heads: int = Field(ge=1)
    scores: list[list[float]]
    head_size: int | None = Field(default=None, ge=1)
    dtype: str | None = None
    guidance: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    curves: dict[str, Any] | None = None
    prompts: list[list[int]] | None = None
    pictures: list[list[int]] | None = None
    trials: list[Trial] = []

    @field_validator("scores")
    @classmethod
    def _shares(cls, scores: list[list[float]]) -> list[list[float]]:
        for layer, row in enumerate(scores):
            for head, score in enumerate(row):
                if not -1e-6 <= score <= 1 + 1e-6:  # a NaN fails the comparison
                    raise ValueError(f"layer {layer} head {head} is {score}, not a share in [0, 1]")
        return scores

    @model_validator(mode="after")
    def _geometry(self) -> "HeadProfile":
        widths = {len(row) for row in self.scores}
        if len(self.scores) != self.layers or widths != {self.kv_heads}:
            raise ValueError(
                f"scores: {len(self.scores)} layers of {sorted(widths)} heads, but layers is {self.layers} "
                f"and kv_heads is {self.kv_heads}"
            )
        if self.format == 2:
            if self.curves is None or self.head_size is None or self.dtype is None:
                raise ValueError("curves: format 2 needs them, with head_size and dtype")
            shape = self.loss_curves.losses.shape[:2]
            if shape != (self.layers, 2 * self.kv_heads):
                raise ValueError(
                    f"curves: of {shape[0]} layers with {shape[1]} cache heads, but layers is {self.layers} "
                    f"and kv_heads is {self.kv_heads} in two branches"
                )
        if self.pictures is not None:
            lengths = {len(one) for one in self.pictures}
            if self.format == 1 or lengths != {self.loss_curves.raster.tokens}:
                raise ValueError(
                    f"pictures: of {sorted(lengths)[:3]} tokens, not whole ones of the curves' grid"
                )
            if any(not 0 <= token < 2**31 for one in self.pictures for token in one):
                raise ValueError("pictures: a number is no token's id")
        if self.prompts is not None:
            if self.pictures is None or len(self.prompts) != len(self.pictures):
                raise ValueError(f"prompts: {len(self.prompts)}, but pictures of other than these")
            if any(not one or not all(0 <= token < 2**31 for token in one) for one in self.prompts):
                raise ValueError("prompts: one is empty, or a number in it is no token's id")
        return self

    @cached_property
    def loss_curves(self) -> LossCurves:
        """The curves. Raises ValueError, one line, where the file has none."""
        if self.curves is None:
            raise ValueError(
                "head_profile: it has locality scores only (format 1), preset fitted needs loss curves; "
                "calibrate again, or set preset to decoupled"
            )
        return LossCurves.load(self.curves)

    def trial(self, wanted: Wanted) -> Trial | None:
        """What was tried for it, if it was."""
        return next((one for one in self.trials if one.of(wanted)), None)

    def head_types(self, threshold: float | None = None) -> np.ndarray:
        """[layers, kv_heads] bool, True for spatial: score <= threshold (None: the profile's own)."""
        return np.array(self.scores) <= (self.threshold if threshold is None else threshold)

    def check_model(self, model: str, model_hash: str, layers: int, kv_heads: int) -> None:
        """Raise ValueError, one line, unless the profile was made for this very model.

        An empty ``model`` or ``model_hash`` on either side is not compared: a profile that is to serve
        several checkpoints of one model leaves it out.
        """
        for name, want in (
            ("layers", layers),
            ("kv_heads", kv_heads),
            ("model", model),
            ("model_hash", model_hash),
        ):
            mine = getattr(self, name)
            if mine != want and mine != "" and want != "":
                raise ValueError(
                    f"head_profile: {name} is {mine!r}, the served model's is {want!r}; "
                    "calibrate this model, or set head_profile to auto"
                )

    def is_of_guidance(self, scale: float) -> bool:
        """Whether the heads were measured with this guidance scale, as far as the file says."""
        return self.guidance in (None, scale)

    def save(self, path: str | Path) -> None:
        """Write JSON; a reader never sees half a file, several writers at once do no harm."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        part.unlink(missing_ok=True)
        # No link that someone left under the name is followed, and nobody else reads half of it.
        handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        try:
            with os.fdopen(handle, "w") as file:
                file.write(self._json() + "\n")
            part.replace(path)
        except BaseException:
            part.unlink(missing_ok=True)  # the disk may be full
            raise

    def _json(self) -> str:
        """A line a field, the long arrays a line each: small, and readable at its head."""
        parts = self.model_dump(exclude_none=True, mode="json")
        return "{\n" + ",\n".join(f" {json.dumps(k)}: {json.dumps(v)}" for k, v in parts.items()) + "\n}"

    @classmethod
    def load(cls, path: str | Path) -> "HeadProfile":
        """Read JSON. Raises ValueError, one line that names the file and the first field that is wrong."""
        try:
            content = Path(path).read_bytes()
        except OSError as error:
            raise ValueError(f"head_profile: cannot read {path}: {error.strerror}") from error
        return cls.parse(content, path)

    @classmethod
    def parse(cls, content: bytes, path: str | Path) -> "HeadProfile":
        """As `load`, of what stands in the file."""
        try:
            return cls.model_validate_json(content, strict=True)  # else 8.0 is 8, and true is 1
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"])
            message = first["msg"].removeprefix("Value error, ").splitlines()[0]
            where = f"{field}: " if field else ""
            raise ValueError(f"head_profile: {path}: {where}{message}; calibrate again") from error
