"""Samples of prompts: chunks of tokens on the devices, and between them the host's decisions."""

import functools
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from rmjax.data.packing import pack
from rmjax.data.row_layout import RowShape, Segment, make_rows, segment_length
from rmjax.errors import UserError
from rmjax.generation.choice import make_rule
from rmjax.generation.completions import SamplingSettings
from rmjax.generation.programs import (
    CHUNK,
    ROW_STATES_AXES,
    Cache,
    Programs,
    Shape,
    make_programs,
)
from rmjax.generation.schedule import Placement, Request, Running, Schedule
from rmjax.inference.batching import PADDED_TOKENS, bucket
from rmjax.models.attention.dispatch import alignment
from rmjax.models.inputs import ROWS_AXES
from rmjax.models.model import Model
from rmjax.models.parameters import Params
from rmjax.runtime.sharding import put

# Of a prompt's number, a sample's, its tokens, and how many of these were looked at before.
IsOver = Callable[[int, int, Sequence[int], int], bool]

_PACKED = 512  # the row length that short prompts are packed into
_PROMPTS = 64  # that a row may hold
_FEWEST_SLOTS = 64


class Sampler:
    """A model's compiled functions, and their use on prompts.

    Args:
      model: with a language-model head.
      rows: samples to make at once.
      usual: places of the prompts that will be asked, where they are known. Shapes are then made
        for them, not for those of a call, so that other calls compile nothing anew.

    Raises:
      UserError: the mesh shards the tokens of rows, of which there is one here.
    """

    def __init__(self, model: Model, rows: int, usual: Sequence[int] = ()):
        mesh = model.options.sharding.mesh
        if mesh.shape["context"] > 1:
            raise UserError(
                f"mesh.context = {mesh.shape['context']}: it shards the tokens of rows, and one "
                "token at a time is sampled; use fsdp or tensor"
            )
        if rows < 1:
            raise UserError(f"rows = {rows}: expected 1 or more")
        self._model, self._rows, self._usual = model, rows, usual

    @functools.cached_property
    def programs(self) -> Programs:
        """The compiled functions."""
        return make_programs(self._model)

    def samples(
        self,
        params: Params,
        requests: Sequence[Request],
        settings: SamplingSettings,
        ends: Sequence[int],
        is_over: IsOver,
    ) -> Iterator[Running]:
        """Every sample of every prompt, when it is over.

        Args:
          params: the model's.
          requests: the prompts; their `waiting` samples are used up.
          settings: how to draw.
          ends: tokens that end a sample.
          is_over: whether something else ends a sample that has new tokens.

        Raises:
          UserError: a log-probability is not finite.
        """
        if not requests:
            return
        places = [request.places for request in requests]
        shape, rows = self.cache_shape(places, settings.n), self.prompt_rows(places)
        schedule, programs = Schedule(requests, shape), self.programs
        sharding = self._model.options.sharding
        cache = programs.make_cache(shape)
        seed = np.uint32(settings.seed)
        rule = make_rule(settings.temperature, settings.top_p, settings.top_k)
        slots, most = shape.slots, max(request.limit for request in requests)
        prepared = programs.prepare(params)
        while True:
            cache = self._insert(params, cache, schedule.fill(), shape, rows)
            if not any(schedule.running()):
                return
            cache, slots = self._make_room(cache, slots, schedule, most)
            cache, sampled = programs.sample(
                prepared,
                cache,
                put(schedule.states(), ROW_STATES_AXES, sharding),
                np.int32(schedule.step),
                seed,
                np.asarray(ends, np.int32),
                rule,
            )
            schedule.step += CHUNK
            tokens = np.asarray(sampled.tokens)
            log_probabilities = np.asarray(sampled.log_probabilities)
            for group, row, running in list(schedule.running()):
                new = tokens[:, group, row]
                count = int((new >= 0).sum())
                checked = len(running.tokens)
                running.tokens += new[:count].tolist()
                running.log_probabilities += log_probabilities[:count, group, row].tolist()
                _check_finite(running)
                full = len(running.tokens) >= running.resident.request.limit
                request, sample = running.resident.request, running.sample
                stopped = is_over(request.number, sample, running.tokens, checked)
                if stopped or full or running.tokens[-1] in ends:
                    schedule.finish(group, row)
                    yield running

    def cache_shape(self, places: Sequence[int], n: int) -> Shape:
        """The cache to begin with; few shapes, because each is compiled.

        Args:
          places: that each prompt takes.
          n: samples of each.
        """
        shards = self._model.options.sharding.row_shards
        samples = n * len(places)
        members = max(1, min(n, min(self._rows, samples) // shards))
        most = -(-self._rows // (members * shards))
        # Tokens are drawn on all devices, if those that share rows can have as many each.
        sharing = self._model.options.sharding.mesh.size // shards
        step = sharing // math.gcd(sharing, members)
        most = -(-most // step) * step
        groups = 1
        while groups < most and groups * shards * members < samples:
            groups *= 2
        groups = shards * min(groups, most)
        longest, mean = self._expected(places)
        room = longest
        if groups * members < samples and members > 1:
            # The next prompt can begin before the last sample of the one before is over.
            room = max(room, 2 * round(mean))
        return Shape(groups, members, bucket(max(1, room), self._model), _FEWEST_SLOTS)

    def prompt_rows(self, places: Sequence[int]) -> RowShape:
        """The rows that prompts of so many places are computed in, as many as at once at most."""
        shards = self._model.options.sharding.row_shards
        longest, mean = self._expected(places)
        together = round(mean * len(places)) // shards
        length = bucket(max(1, longest, min(_PACKED, together)), self._model)
        most = shards * max(1, PADDED_TOKENS // (length * shards))
        align = alignment(self._model.options.attention, length, self._model.config)
        return RowShape(most, length, _PROMPTS, align)

    def _expected(self, places: Sequence[int]) -> tuple[int, float]:
        """The most places that a prompt takes, and their mean."""
        usual = self._usual or places
        return max(max(places), max(usual)), sum(usual) / len(usual)

    @staticmethod
    def most_slots(limit: int) -> int:
        """Slots of a cache when samples have so many tokens."""
        return max(_FEWEST_SLOTS, -(-limit // CHUNK) * CHUNK)

    def _make_room(
        self, cache: Cache, slots: int, schedule: Schedule, most: int
    ) -> tuple[Cache, int]:
        """A cache with enough slots for the next chunk: few, because all of them are read."""
        needed = schedule.slots_needed()
        if needed <= slots:
            return cache, slots
        more = slots
        while more < needed:
            more *= 2
        more = max(needed, min(more, self.most_slots(most)))
        source = np.zeros(more, np.int32)
        steps = np.arange(max(0, schedule.step - slots), schedule.step)
        source[steps % more] = steps % slots
        return self.programs.move(cache, source), more

    def _insert(
        self,
        params: Params,
        cache: Cache,
        placements: Sequence[Placement],
        shape: Shape,
        of_prompts: RowShape,
    ) -> Cache:
        """Computes prompts in packed rows, each once, and writes what is kept of them."""
        sharding = self._model.options.sharding
        row_length, align = of_prompts.length, of_prompts.align
        requests = list(
            {p.request.number: p.request for p in placements if p.request.places}.values()
        )
        lengths = [segment_length([request.places], 0, align) for request in requests]
        packed = pack(lengths, row_length, of_prompts.slots)
        shards, most = sharding.row_shards, of_prompts.rows
        for first in range(0, len(packed), most):
            rows = packed[first : first + most]
            count = shards
            while count < len(rows):
                count *= 2
            segments = [[Segment([requests[i].tokens[:-1]]) for i in row] for row in rows]
            laid = make_rows(segments, min(count, most), of_prompts)
            begins = {
                requests[item].number: number * row_length + sum(lengths[i] for i in row[:place])
                for number, row in enumerate(rows)
                for place, item in enumerate(row)
            }
            source = np.full((shape.groups, shape.places), -1, np.int32)
            for request, group, start in placements:
                if request.number in begins:
                    tokens = begins[request.number] + np.arange(request.places)
                    source[group, start : start + request.places] = tokens
            cache = self.programs.insert(
                params,
                cache,
                put(laid, ROWS_AXES, sharding),
                put(source, ("row", "place"), sharding),
            )
        return cache


def _check_finite(running: Running) -> None:
    if not np.isfinite(running.log_probabilities).all():
        raise UserError(
            f"prompt {running.resident.request.number}: log-probabilities are not finite; the "
            "weights are damaged, or the computation's type is too small for them"
        )
