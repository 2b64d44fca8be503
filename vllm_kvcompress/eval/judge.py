"""Judge pictures of the shapes world: does what is seen fit the prompt, and is it undamaged.

The categories are GenEval's (arXiv 2310.11513, table 1).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from .objects import Seen, find_objects
from .scenes import MARGIN, relation_holds
from .world import IMAGE_SIZE, PLACES, Phrase, Prompt

PLACE_TOLERANCE = 0.2
"""A place is met within this fraction of the picture's side."""


@dataclass(frozen=True)
class Verdict:
    """What of a prompt a picture got right. `None`: the prompt does not say.

    `objects`: every phrase matched by exactly its count in shape (and colour and size where said), and
    nothing left over; `shapes`, `colours`: the same for shapes alone and for shape with colour;
    `count`: the number of objects; `relation`, `place`: see `Prompt`, on objects that fit the phrases.
    `present`: GenEval's own, milder rule: what is asked for is there, as often as a number says and in
    the relation asked for, whatever else is in the picture.
    `whole`: every object is an undamaged shape, whichever the prompt asks for; a picture without any
    object is not whole. `objects_seen`: how many were found.
    """

    objects: bool
    shapes: bool
    colours: bool | None
    count: bool
    size: bool | None
    relation: bool | None
    place: bool | None
    present: bool
    whole: bool
    objects_seen: int

    @property
    def correct(self) -> bool:
        """Everything that the prompt says is so."""
        return self.objects and self.relation is not False and self.place is not False


def _matches(
    seen: list[Seen], phrases: Sequence[Phrase], colour: bool, size: bool, beside: bool = False
) -> Iterator[list[list[Seen]]]:
    """All ways to split the objects among the phrases, exactly each phrase's count to it.

    None is left over, unless others may stand `beside` them; those are of other kinds where a phrase
    names a number above one.
    """
    if not phrases:
        if beside or not seen:
            yield []
        return
    head = phrases[0]
    wanted = Phrase(head.count, head.shape, head.colour if colour else None, head.size if size else None)
    fitting = [s for s in seen if wanted.describes(s.shape, s.colour, s.size)]
    if beside and head.count > 1 and len(fitting) > head.count:
        return
    for chosen in combinations(fitting, head.count):
        rest = [s for s in seen if s not in chosen]
        for others in _matches(rest, phrases[1:], colour, size, beside):
            yield [list(chosen), *others]


def judge(image: NDArray[np.uint8], prompt: Prompt) -> Verdict:
    """Compare a picture (`[96, 96, 3]` uint8 RGB) with a prompt."""
    seen = find_objects(image)
    phrases = prompt.phrases
    shapes = any(_matches(seen, phrases, colour=False, size=False))
    coloured = list(_matches(seen, phrases, colour=True, size=False))
    sized = list(_matches(seen, phrases, colour=True, size=True))
    fits = sized or coloured
    relation = place = None
    if prompt.relation is not None:
        relation = any(_related(prompt.relation, *groups) for groups in fits)
    if prompt.place is not None:
        place = any(_in_place(prompt.place, groups[0][0]) for groups in fits)
    present = any(
        (prompt.relation is None or _related(prompt.relation, *groups))
        and (prompt.place is None or _in_place(prompt.place, groups[0][0]))
        for groups in _matches(seen, phrases, colour=True, size=True, beside=True)
    )
    return Verdict(
        objects=bool(sized),
        shapes=shapes,
        colours=bool(coloured) if any(phrase.colour for phrase in phrases) else None,
        count=len(seen) == sum(phrase.count for phrase in phrases),
        size=bool(sized) if any(phrase.size for phrase in phrases) else None,
        relation=relation,
        place=place,
        present=present,
        whole=all(one.whole for one in seen) and (bool(seen) or not phrases),
        objects_seen=len(seen),
    )


def _related(relation: str, first: list[Seen], second: list[Seen]) -> bool:
    return all(relation_holds(relation, (a.x, a.y), (b.x, b.y)) for a in first for b in second)


def _in_place(place: str, thing: Seen) -> bool:
    margin = thing.side / 2 + MARGIN
    wanted = (margin + fraction * (IMAGE_SIZE - 2 * margin) for fraction in PLACES[place])
    return all(
        abs(a - b) <= PLACE_TOLERANCE * IMAGE_SIZE for a, b in zip((thing.x, thing.y), wanted, strict=True)
    )
