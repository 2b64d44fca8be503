"""Head profile: which KV heads are spatial, and the locality scores that say so (a small JSON file).

SSD (https://arxiv.org/abs/2510.18716) splits heads by how much of their attention leaves the query's
neighbourhood; docs/design.md, "The method", point 9, says how the score is measured here.
"""

import os
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator


class HeadProfile(BaseModel):
    """Locality scores of every KV head of one model.

    Parameters
    ----------
    model : str
        Name of the model that was calibrated.
    model_hash : str
        Fingerprint of its weights or config, whatever the calibration took.
    metric : str
        Name of the metric behind ``scores``.
    threshold : float
        A head scoring above it is semantic, the others are spatial; in [0, 1].
    prompts_hash : str
        Fingerprint of the prompts that the scores are a mean over.
    neighbourhood : int
        Image tokens before the query, in raster order, that count as near.
    layers, kv_heads : int
        Geometry of the model.
    scores : list of list of float
        [layers][kv_heads] attention mass outside the neighbourhood, in [0, 1].
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model: str
    model_hash: str
    metric: str
    threshold: float = Field(ge=0, le=1, allow_inf_nan=False)
    prompts_hash: str
    neighbourhood: int = Field(ge=1)
    layers: int = Field(ge=1)
    kv_heads: int = Field(ge=1)
    scores: list[list[float]]

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
        return self

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

    def save(self, path: str | Path) -> None:
        """Write JSON; a reader never sees half a file, several writers at once do no harm."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        part.write_text(self.model_dump_json(indent=1) + "\n")
        part.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> "HeadProfile":
        """Read JSON.

        Raises
        ------
        ValueError
            One line that names the file and the first field that is wrong.
        """
        try:
            return cls.model_validate_json(Path(path).read_bytes())
        except OSError as error:
            raise ValueError(f"head_profile: cannot read {path}: {error.strerror}") from error
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"])
            message = first["msg"].removeprefix("Value error, ").splitlines()[0]
            where = f"{field}: " if field else ""
            raise ValueError(f"head_profile: {path}: {where}{message}; calibrate again") from error
