"""The soaks that are run by hand, a little of them: so that they can be run."""

import sys
from pathlib import Path

import pytest
from inprocess import in_process  # noqa: F401

sys.path.insert(0, str(Path(__file__).parent / "soak"))

import soak_pictures


def test_pictures(checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak_pictures, "PICTURES", 60)
    soak_pictures.test_soak(checkpoints, "fitted")
