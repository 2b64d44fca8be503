"""What the compressed cache keeps of a picture that is being drawn, asked of the engine's workers."""

from typing import TYPE_CHECKING, Any

from vllm_kvcompress.config import is_compressed
from vllm_kvcompress.log import logger_for
from vllm_kvcompress.serving.alive import unless_dead
from vllm_kvcompress.serving.one_engine import OneEngine
from vllm_kvcompress.serving.protocol import Kept, KeptOfType

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient

    from vllm_kvcompress.models.config import ImageModel
    from vllm_kvcompress.policy.raster import Raster

KEPT_METHOD = "kvcompress_kept"

logger = logger_for(__name__)


class KeptReader:
    """Asks for pictures of one server, of one at a time: all ranks stop for an answer.

    Parameters
    ----------
    engine : EngineClient
        The server's.
    model : ImageModel
        What is served.
    """

    def __init__(self, engine: "EngineClient", model: "ImageModel") -> None:
        self._compressed = is_compressed(engine.vllm_config)
        self._engine = engine
        self._workers = OneEngine(engine)
        self._rasters = model.rasters
        self.busy = False  # somebody asks

    @property
    def compressed(self) -> bool:
        """Whether there is anything to say: a full cache keeps every token."""
        return self._compressed

    async def __call__(self, request_id: str, prefix: int, size: int = 0) -> Kept | None:
        """What is kept of a picture now; None if it is not being drawn, or the engine does not say."""
        if not self._compressed:
            return None
        self.busy = True
        try:
            for _ in range(self._workers.engines):
                answers = await unless_dead(self._engine, self._asked(request_id, prefix, size))
                if ranks := [answer for answer in answers if answer is not None]:
                    return _over_ranks(ranks, self._rasters[size])
        # An engine that drains answers no calls, and the picture goes on; one that has died gives no more
        # outputs, and who waits for those is told.
        except Exception as error:
            logger.debug("No word of what is kept: %s", error)
        finally:
            self.busy = False
        return None

    async def _asked(self, *args: Any) -> list[Any]:
        return await self._workers.call(KEPT_METHOD, args)


def _over_ranks(ranks: list[tuple[int, list[tuple[str, int, list[int]]]]], raster: "Raster") -> Kept:
    """One answer of those of an engine's ranks, each of which has some of the heads."""
    types = []
    for parts in zip(*(types for _, types in ranks), strict=True):
        heads = sum(part[1] for part in parts)
        counts = [sum(held) for held in zip(*(part[2] for part in parts), strict=True)]
        percent = [round(100 * held / heads) for held in raster.cells(counts)]
        types.append(KeptOfType(name=parts[0][0], heads=heads, percent=percent))
    drawn = len(raster.cells(range(ranks[0][0])))
    return Kept(lines=raster.lines, columns=raster.columns, drawn=drawn, types=types)
