"""What the front end calls in the worker."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_kvcompress.models.vq import VQDecoder
from vllm_kvcompress.policy.raster import Raster
from vllm_kvcompress.testing.checkpoints import TINY
from vllm_kvcompress.testing.configs import transformers_config
from vllm_kvcompress.worker import kvcompress_decode_image, kvcompress_decode_images


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def worker(request: pytest.FixtureRequest) -> Any:
    """Of rank 0, with an untrained decoder."""
    torch.manual_seed(0)
    config = transformers_config(TINY, "float32", image_token_id=5).vq_config
    raster = Raster(TINY.lines, TINY.lines, patch=TINY.patch)
    vq = VQDecoder(config, raster, dtype=request.param)
    model = SimpleNamespace(vq=vq, image=SimpleNamespace(sizes=[SimpleNamespace(raster=raster)]))
    return SimpleNamespace(rank=0, vq=vq, model_runner=SimpleNamespace(get_model=lambda: model))


def codes(seed: int, lines: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 16, (lines * TINY.lines,), generator=generator).tolist()


def test_a_picture_is_the_same_to_the_bit_in_any_company(worker: Any) -> None:
    """Finished and unfinished ones in one call, each as it comes alone."""
    pictures = [codes(seed, lines) for seed, lines in enumerate((TINY.lines, 3, TINY.lines, 1))]
    alone = [kvcompress_decode_image(worker, picture) for picture in pictures]
    assert kvcompress_decode_images(worker, [(picture, 0) for picture in pictures]) == alone
    assert [height for _, height, _ in alone if alone] == [
        len(p) // TINY.lines * TINY.patch for p in pictures
    ]
    assert len({rgb for *_, rgb in alone}) == len(alone)


def test_other_workers_of_the_engine_leave_it(worker: Any) -> None:
    other = SimpleNamespace(rank=1)
    assert kvcompress_decode_images(other, [(codes(0, 1), 0)]) is None
    assert kvcompress_decode_image(other, codes(0, 1)) is None


def test_codes_that_are_wrong_are_the_calls_failure(worker: Any) -> None:
    with pytest.raises(ValueError, match="whole lines"):
        kvcompress_decode_images(worker, [(codes(0, 1), 0), (codes(0, 1)[:-1], 0)])
