"""What tests of converters share."""

from pathlib import Path
from typing import Any

import pytest

from vllm_kvcompress.models.weights import CheckpointError


class Converting:
    """Files to be converted into the folder ``out``."""

    out: Path

    def convert(self, **more: Any) -> bool:
        raise NotImplementedError

    def refused(self, **more: Any) -> str:
        """The error's one line, after which nothing is in the folder's place."""
        with pytest.raises(CheckpointError) as caught:
            self.convert(**more)
        assert not self.out.exists()
        assert "\n" not in str(caught.value)
        return str(caught.value)
