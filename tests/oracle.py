"""What the paged cache must equal: a dense oracle, and a driver that plays both over the same requests.

The oracle keeps all K and V of a head and a visibility mask that follows from the rule word by word:
python lists, float64, one head and one token at a time. It shares no code with the package.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path

import numpy as np
import torch
from hypothesis import HealthCheck, settings, strategies

from vllm_kvcompress.attention.pages import HeadType, Plan, page_bytes, pages_from_bytes
from vllm_kvcompress.attention.prefill import prefill
from vllm_kvcompress.attention.prefill_plan import PrefillPlan
from vllm_kvcompress.attention.reference import decode, select_victims
from vllm_kvcompress.heads.curves import LossCurves, candidate_types
from vllm_kvcompress.heads.fit import fit
from vllm_kvcompress.policy import DECAY, PRESETS, REFINEMENTS, Policy
from vllm_kvcompress.policy.raster import Raster
from vllm_kvcompress.policy.rule import HeadRule


@dataclass
class Drawing:
    """One cache head's history of one request: outputs, mask, and what each line's end chose."""

    out: np.ndarray  # [tokens, group, D]
    mask: np.ndarray  # [tokens, tokens] bool: which tokens each query saw
    victims: dict[int, list[int]]  # drawn -> image slots chosen then, in order
    holds: list[int]  # the image token in each slot at the end
    score: list[float]  # per slot at the end


def draw(rule: HeadRule, prefix: int, q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float) -> Drawing:
    """q [tokens, group, D], k and v [tokens, D] of one cache head; the first ``prefix`` are the prompt."""
    total = len(k)
    done = Drawing(np.zeros(q.shape), np.zeros((total, total), bool), {}, [], [])
    holds, score = done.holds, done.score
    queue: list[int] = []
    for now in range(total):
        token = now - prefix
        if token >= 0:
            if len(holds) < rule.capacity:
                holds.append(token)
                score.append(0.0)
            else:
                oldest = min(t for t in holds if t >= rule.anchors)
                slot = holds.index(oldest) if rule.ring else queue.pop(0)
                holds[slot], score[slot] = token, 0.0
        done.mask[now, : min(prefix, now + 1)] = True
        done.mask[now, [prefix + t for t in holds]] = True
        logits = np.where(done.mask[now], q[now] @ k.T * scale, -np.inf)
        weight = np.exp(logits - logits.max(-1, keepdims=True))
        weight /= weight.sum(-1, keepdims=True)
        done.out[now] = weight @ v
        for slot, t in enumerate(holds):
            score[slot] += weight[:, prefix + t].sum()
        drawn = token + 1
        if token >= 0 and drawn % rule.line == 0:
            due = 0 if rule.ring or drawn == rule.image else rule.line - (rule.capacity - len(holds))
            if due > 0:
                queue = _choose(rule, drawn, holds, score, v[prefix:])[:due]
                done.victims[drawn] = list(queue)
            score[:] = [rule.decay * mass for mass in score]
    return done


def _choose(rule: HeadRule, drawn: int, holds: list[int], score: list[float], v: np.ndarray) -> list[int]:
    mass = {t: score[slot] for slot, t in enumerate(holds)}
    if rule.value_norm:
        mass = {t: m * np.sqrt((v[t] ** 2).sum()) for t, m in mass.items()}
    if rule.smooth_row:
        beside = {t: [n for n in (t - 1, t, t + 1) if n in mass] for t in mass}
        row = {t: [n for n in beside[t] if n // rule.line == t // rule.line] for t in mass}
        mass = {t: sum(mass[n] for n in row[t]) / len(row[t]) for t in mass}
    order = sorted((t for t in mass if rule.anchors <= t < drawn - rule.recent), key=lambda t: (mass[t], t))
    if rule.stratify:
        column = [t % rule.line for t in order]
        rank = {t: column[:i].count(column[i]) for i, t in enumerate(order)}
        order.sort(key=lambda t: rank[t])
    return [holds.index(t) for t in order]


@dataclass
class World:
    """A small model's geometry: the head type of each cache head, and one rule per type."""

    rules: tuple[HeadRule, ...]
    kinds: np.ndarray  # [layers, branches * kv_heads] int: index into rules
    group: int = 1  # query heads per KV head
    head_size: int = 8
    pages: tuple[int, ...] = (4, 4)  # slots per page of each type, from the first again where types are more
    others: tuple[tuple[HeadRule, ...], ...] = ()  # the types' rules for pictures of further sizes

    def of_size(self, size: int) -> tuple[HeadRule, ...]:
        """The rules of each type for pictures of one size; 0 is that of ``rules``."""
        return (self.rules, *self.others)[size]

    def image(self, size: int = 0) -> int:
        """Tokens of a picture."""
        return self.of_size(size)[0].image

    def sized(self, kind: int) -> tuple[HeadRule, ...]:
        """A type's rule for each size; empty where there is one."""
        return tuple(self.of_size(n)[kind] for n in range(1 + len(self.others))) if self.others else ()

    def members(self, kind: int, layer: int) -> np.ndarray:
        """Places of a type's cache heads on the branch * Hkv axis of one layer."""
        return np.flatnonzero(self.kinds[layer] == kind)

    def page(self, kind: int) -> int:
        """Slots per page of a type."""
        return self.pages[kind % len(self.pages)]


def world(preset: str, budget: float, raster: Raster, spatial: list[list[int]], **geometry) -> World:
    """A world under a preset; ``spatial`` counts only for presets that read a head profile.

    Under `fitted` the types are fitted to made-up losses.
    """
    refine = {
        name: geometry.pop(name) for name in (*REFINEMENTS, "anchor_tokens", "score") if name in geometry
    }
    branches = geometry.pop("branches", 2)
    heads, types = np.array(spatial, bool), PRESETS[preset].head_types
    if types == "fitted":
        found = made_up_fit(raster, budget, (heads.shape[0], 2 * heads.shape[1]))
        return World(found.rules, found.types[:, : branches * heads.shape[1]], **geometry)
    if types != "profile":
        heads[:] = types == "spatial"
    refine = {} if types == "spatial" else refine
    both = Policy(preset, budget, **refine).rules(raster, int(heads.sum()), int((~heads).sum()))
    rules = tuple(rule for rule in both if rule is not None)
    kinds = np.where(heads, 0, len(rules) - 1)
    return World(rules, np.concatenate([kinds] * branches, 1), **geometry)


def made_up_curves(raster: Raster, heads: tuple[int, int], seed: int = 0) -> LossCurves:
    """Losses ``[layers, cache heads]`` that fall with the slots, each head in its own way."""
    candidates, rng = candidate_types(raster), np.random.default_rng(seed)
    slots = np.array([rule.capacity for rule in candidates])
    need, reach = rng.lognormal(0, 2, (*heads, 1)), rng.uniform(0.5, 4, (*heads, 1)) * raster.width
    losses = need * np.exp(-slots / reach) * rng.uniform(0.8, 1.2, (*heads, len(candidates)))
    losses[..., [not rule.evicts for rule in candidates]] = 0
    return LossCurves(candidates, losses)


def write_profile(path: Path, spatial: Sequence[Sequence[int]], raster: Raster) -> Path:
    """A head profile of any model of these layers and KV heads; 1 is a spatial head, curves are made up."""
    curves = made_up_curves(raster, (len(spatial), 2 * len(spatial[0])))
    fields = {"model": "", "model_hash": "", "metric": "made up", "prompts_hash": "", "format": 2,
              "head_size": 128, "dtype": "bfloat16", "curves": curves.dump(), "layers": len(spatial),
              "kv_heads": len(spatial[0]), "neighbourhood": 16, "threshold": 0.5}  # fmt: skip
    scores = [[0.9 - 0.8 * head for head in row] for row in spatial]
    path.write_text(json.dumps(fields | {"scores": scores}))
    return path


def made_up_fit(raster: Raster, budget: float, heads: tuple[int, int], types: int = 6, seed: int = 0):
    """A fit to made-up losses."""
    return fit(made_up_curves(raster, heads, seed), np.floor(budget * raster.tokens + 1e-9), types)


@strategies.composite
def worlds(draw_) -> World:
    """Any small world: grids, presets, budgets, anchors, head profiles that differ by layer, page sizes."""
    raster = Raster(draw_(strategies.integers(1, 6)), draw_(strategies.integers(1, 6)))
    layers, heads = draw_(strategies.integers(1, 3)), draw_(strategies.integers(1, 3))
    geometry = {
        "group": draw_(strategies.integers(1, 3)),
        "head_size": 4,
        "pages": tuple(draw_(strategies.lists(strategies.integers(1, 7), min_size=2, max_size=6))),
    }
    if draw_(strategies.booleans()):
        return draw_(mixed_worlds(raster, layers, heads, geometry))
    head = strategies.lists(strategies.integers(0, 1), min_size=heads, max_size=heads)
    whole = strategies.sampled_from([[0] * heads, [1] * heads])
    slots = draw_(strategies.integers(raster.width, raster.tokens))
    found = world(
        draw_(strategies.sampled_from(sorted(PRESETS))),
        slots / raster.tokens,
        raster,
        [draw_(head | whole) for _ in range(layers)],
        score=draw_(strategies.sampled_from([None, *DECAY])),
        **{name: draw_(strategies.booleans()) for name in REFINEMENTS},
        **geometry,
    )
    if draw_(strategies.booleans()):  # anchors and recent beyond what the defaults choose
        room = [rule.capacity - rule.line for rule in found.rules]
        kept = [draw_(strategies.integers(0, n)) for n in room]
        recent = [draw_(strategies.integers(0, n - m)) for n, m in zip(room, kept, strict=True)]
        changes = [{"anchors": m, "recent": n} for m, n in zip(kept, recent, strict=True)]
        found.rules = tuple(
            replace(rule, **change) for rule, change in zip(found.rules, changes, strict=True)
        )
    return found


@strategies.composite
def head_rules(draw_, raster: Raster) -> HeadRule:
    """Any rule on a grid."""
    slots = draw_(strategies.integers(raster.width, raster.tokens))
    room = raster.tokens if slots == raster.tokens else slots - raster.width
    anchors = draw_(strategies.integers(0, room))
    ring = draw_(strategies.booleans())
    if ring:
        return HeadRule(slots, raster.width, raster.tokens, anchors, slots - anchors, ring=True)
    refine = {name: draw_(strategies.booleans()) for name in REFINEMENTS}
    recent = draw_(strategies.integers(0, room - anchors))
    decay = draw_(strategies.sampled_from([0.0, 0.5, 1.0]))
    return HeadRule(slots, raster.width, raster.tokens, anchors, recent, decay=decay, **refine)


@strategies.composite
def mixed_worlds(draw_, raster: Raster, layers: int, heads: int, geometry: dict) -> World:
    """One to six types of any mix; layers in which a type has no head, branches that differ."""
    rules = draw_(strategies.lists(head_rules(raster), min_size=1, max_size=6))
    kind = strategies.integers(0, len(rules) - 1)
    row = strategies.lists(kind, min_size=2 * heads, max_size=2 * heads)
    return World(tuple(rules), np.array([draw_(row) for _ in range(layers)]), **geometry)


@strategies.composite
def sized_worlds(draw_) -> World:
    """Any small world that draws pictures of two or three sizes, lines of other widths among them."""
    found = draw_(worlds())
    for _ in range(draw_(strategies.integers(1, 2))):
        raster = Raster(draw_(strategies.integers(1, 6)), draw_(strategies.integers(1, 6)))
        found.others += (tuple(draw_(resized(rule, raster)) for rule in found.rules),)
    return found


@strategies.composite
def resized(draw_, rule: HeadRule, raster: Raster) -> HeadRule:
    """Any rule of the same kind on another grid."""
    other = draw_(head_rules(raster))
    recent = other.capacity - other.anchors if rule.ring else 0 if other.ring else other.recent
    kept = (other.capacity, other.line, other.image, other.anchors, recent)
    return replace(rule, **dict(zip(("capacity", "line", "image", "anchors", "recent"), kept, strict=True)))


def one_thread() -> Iterator[None]:
    """Fixture: on tensors this small, threads cost more than they do."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


quiet = list(HealthCheck)
bounded = settings(max_examples=40, derandomize=True, deadline=None, suppress_health_check=quiet)


@dataclass
class Run:
    """Requests played through the paged cache, in memory filled with NaN, over shuffled block tables."""

    world: World
    prefix: list[int]
    total: list[int]  # tokens of each request
    seed: int = 0
    decode: Callable = decode
    select: Callable = select_victims
    prefill: Callable = prefill
    dtype: torch.dtype = torch.float32
    victims: list[dict] = field(default_factory=list)
    begins: list[tuple[int, int]] | None = None  # where each request's branches begin
    sizes: list[int] | None = None  # of each request's picture, in a world of several

    def size(self, row: int) -> int:
        """Of a request's picture."""
        return 0 if self.sizes is None else self.sizes[row]

    def size_of(self, rows: list[int]) -> torch.Tensor | None:
        """``size`` of a plan of these rows."""
        return None if self.sizes is None else _int32([self.sizes[row] for row in rows])

    def __post_init__(self) -> None:
        world, gen = self.world, torch.Generator().manual_seed(self.seed)
        layers, heads = world.kinds.shape
        rows, most = len(self.prefix), max(self.total)
        self.length = [0] * rows
        kv = (rows, most, layers, heads, world.head_size)
        self.k, self.v = torch.randn(kv, generator=gen), torch.randn(kv, generator=gen)
        self.q = torch.randn((*kv[:3], kv[3] * world.group, kv[4]), generator=gen)
        self.out = torch.full(self.q.shape, torch.nan)
        self.scale = world.head_size**-0.5
        self.types: list[HeadType | None] = []
        for kind, rule in enumerate(world.rules):
            owned = sum(len(world.members(kind, layer)) for layer in range(layers))
            if not owned:
                self.types.append(None)
                continue
            page = world.page(kind)
            kept = [world.of_size(self.size(row))[kind].capacity for row in range(rows)]
            need = [-(-(p + n) // page) for p, n in zip(self.prefix, kept, strict=True)]
            blocks = sum(need) + 2
            scores = any(one.scores for one in world.sized(kind) or [rule])
            size = -(-page_bytes(owned, page, world.head_size, self.dtype, scores) // 4) * 4 + 8
            raw = torch.zeros((blocks, size), dtype=torch.int8)
            pages = pages_from_bytes(raw, owned, page, world.head_size, self.dtype, scores)
            pages.kv.fill_(torch.nan)
            pages.score.fill_(torch.nan)
            pages.token.fill_(-77)
            pages.victim.fill_(-77)
            free = torch.randperm(blocks, generator=gen).tolist()
            table = torch.full((rows, max(need) + 1), -1, dtype=torch.int32)
            for row, n in enumerate(need):
                table[row, :n] = torch.tensor([free.pop() for _ in range(n)])
            index = torch.zeros(owned, dtype=torch.int32)
            self.types.append(HeadType(pages, rule, index, table, world.sized(kind)))
        self.victims = [{} for _ in range(rows)]

    def layer(self, layer: int, rows: list[int] | None = None) -> list[HeadType]:
        """The head types of one layer; ``rows`` picks and orders the block tables."""
        found = []
        for kind, whole in enumerate(self.types):
            sizes = [len(self.world.members(kind, n)) for n in range(layer + 1)]
            if whole is not None and sizes[-1]:
                index = torch.tensor(self.world.members(kind, layer), dtype=torch.int32)
                table = whole.block_table if rows is None else whole.block_table[rows]
                pages = whole.pages.layer(sum(sizes[:-1]), sum(sizes))
                found.append(HeadType(pages, whole.rule, index, table, whole.sized))
        return found

    def step(self, rows: list[int]) -> None:
        """One token for each of ``rows``; -1 is a padding row."""
        for row in rows:
            self.length[row] += row >= 0
        at = [self.length[row] - 1 for row in rows]
        length = [self.length[row] if row >= 0 else 0 for row in rows]
        prefix = _int32([self.prefix[row] for row in rows])
        plan = Plan(prefix, _int32(length), self.begins_of(rows), self.size_of(rows))
        for layer in range(len(self.world.kinds)):
            q, k, v = (x[rows, at, layer] for x in (self.q, self.k, self.v))
            out = torch.full_like(q, torch.nan)
            self.decode(q, k, v, self.layer(layer, rows), plan, self.scale, out)
            for n, row in enumerate(rows):
                if row >= 0:
                    self.out[row, at[n], layer] = out[n]
                else:
                    assert not out[n].any(), "a padding row's output is zero"
        for whole in filter(None, self.types):
            self.select(replace(whole, block_table=whole.block_table[rows]), plan)
        self.note(rows)

    def begins_of(self, rows: list[int]) -> torch.Tensor | None:
        """``begins`` of a plan of these rows."""
        return None if self.begins is None else torch.tensor([self.begins[row] for row in rows]).int()

    def chunk(self, counts: dict[int, int]) -> None:
        """That many tokens for each row at once, through `prefill`."""
        spans = [(row, self.length[row], self.length[row] + n) for row, n in counts.items()]
        start = np.cumsum([0, *counts.values()]).tolist()
        for row, _, end in spans:
            self.length[row] = end
        rows = list(counts)
        prefix, length = [self.prefix[r] for r in rows], [end for *_, end in spans]
        begins = None if self.begins is None else [self.begins[row] for row in rows]
        sizes = [self.size(row) for row in rows]
        plan = PrefillPlan.of(start, prefix, length, torch.device("cpu"), begins, sizes)
        for layer in range(len(self.world.kinds)):
            mine = [x[:, :, layer] for x in (self.q, self.k, self.v)]
            q, k, v = (torch.cat([x[row, first:end] for row, first, end in spans]) for x in mine)
            out = torch.full_like(q, torch.nan)
            self.prefill(q, k, v, self.layer(layer, rows), plan, self.scale, out)
            for (row, first, end), part in zip(spans, out.split(list(counts.values())), strict=True):
                self.out[row, first:end, layer] = part
        self.note(rows)

    def restart(self, row: int, prefix: int) -> None:
        """Abort a request; another, of a prompt no longer than its was, gets its dirty blocks."""
        self.total[row] += prefix - self.prefix[row]
        self.prefix[row], self.length[row], self.victims[row] = prefix, 0, {}

    def note(self, rows: list[int]) -> None:
        """Remember the victims that each row's last line left, per type."""
        for row, (kind, whole) in product((row for row in rows if row >= 0), enumerate(self.types)):
            drawn = self.length[row] - self.prefix[row]
            if whole and drawn > 0 and (rule := whole.of(self.size(row)).rule).scores:
                due = range(rule.victims_due(drawn))
                self.victims[row][drawn, kind] = self.read(row, whole, "victim", due) if due else None

    def read(self, row: int, whole: HeadType, name: str, logical: range) -> torch.Tensor:
        """[heads, slots] of a field of the pages at logical slots of a row."""
        page, part = whole.pages.page, getattr(whole.pages, name)
        return torch.stack([part[whole.block_table[row, n // page], :, n % page] for n in logical], 1)

    def check(self, atol: float = 1e-5) -> None:
        """Compare everything drawn so far with the oracle: outputs, victims, tokens and scores.

        A branch that begins later is to the oracle one with a shorter prompt.
        """
        for row, prefix in enumerate(self.prefix):
            n = self.length[row]
            for kind, whole in enumerate(self.types):
                cache_head = 0
                if whole is None or not n:
                    continue
                for layer in range(len(self.world.kinds)):
                    q, k, v = (x[row, :n, layer].double().numpy() for x in (self.q, self.k, self.v))
                    for head in self.world.members(kind, layer):
                        group = slice(head * self.world.group, (head + 1) * self.world.group)
                        branch = int(head >= self.world.kinds.shape[1] // 2)
                        at = slice(0 if self.begins is None else self.begins[row][branch], None)
                        mine, key, value = q[at, group], k[at, head], v[at, head]
                        out = self.out[row, :n, layer, group]
                        assert out.isfinite().all()
                        if len(key):
                            rule = self.world.of_size(self.size(row))[kind]
                            want = draw(rule, prefix - at.start, mine, key, value, self.scale)
                            self._compare(row, kind, cache_head, want, out[at], atol)
                        cache_head += 1

    def _compare(self, row: int, kind: int, head: int, want: Drawing, out: torch.Tensor, atol: float) -> None:
        np.testing.assert_allclose(out.double().numpy(), want.out, atol=atol, rtol=0)
        for (drawn, noted), found in self.victims[row].items():
            if noted == kind:
                assert want.victims.get(drawn) == (None if found is None else found[head].tolist())
        prefix, whole, rule = self.prefix[row], self.types[kind], self.world.of_size(self.size(row))[kind]
        slots = range(prefix, prefix + len(want.holds))
        if whole is None or not slots:
            return
        if not rule.scores:
            assert rule.held(self.length[row] - prefix) == want.holds
        else:
            assert self.read(row, whole, "token", slots)[head].tolist() == want.holds
            score = self.read(row, whole, "score", slots)[head].double().numpy()
            np.testing.assert_allclose(score, want.score, atol=10 * atol, rtol=1e-5)


def _int32(numbers: list[int]) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32)
