"""What a contender reports of one line."""

from dataclasses import dataclass


@dataclass
class LineSample:
    """One line of ``batch`` pictures, drawn.

    Parameters
    ----------
    line : int
        From 0.
    first_s : float
        Seconds before the line's first step: at line 0 the prompts.
    step_s : list of float
        Seconds of each step.
    kv_bytes : float
        KV memory held by a picture at the line's end.
    """

    line: int
    first_s: float
    step_s: list[float]
    kv_bytes: float
