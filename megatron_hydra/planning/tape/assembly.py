"""Profiles of a stage's pieces, and their sum over one micro-batch."""

from __future__ import annotations

import dataclasses
from collections import Counter

from megatron_hydra.planning.tape.tensors import Sent, Work

Bytes = Counter[str]


@dataclasses.dataclass(frozen=True)
class Piece:
    """Profile of a part of a stage.

    Attributes:
        kept: bytes kept for the backward, by part.
        forward, backward: bytes by part at the highest moment of each.
        work, sent: of both.
    """

    kept: Bytes
    forward: Bytes
    backward: Bytes
    work: tuple[Work, ...]
    sent: tuple[Sent, ...]


@dataclasses.dataclass(frozen=True)
class Part:
    """Work of a piece that is done in one go: its forward, its backward (what is recomputed for it
    included), or both where nothing lies between them.
    """

    work: tuple[Work, ...]
    sent: tuple[Sent, ...]

    def forward(self) -> Part:
        """Its forward alone, as a validation runs it."""
        return Part(
            tuple(w for w in self.work if w.phase == "forward"),
            tuple(s for s in self.sent if s.phase == "forward"),
        )


@dataclasses.dataclass
class Stage:
    """What one micro-batch asks of a stage.

    Attributes:
        kept: bytes from the end of its forward to its backward, by part.
        peak: bytes by part at the highest moment, what is kept included.
        work, sent: with how often each occurs.
        order: the pieces' forwards and backwards as they follow one another.
    """

    kept: Bytes
    peak: Bytes
    work: list[Work]
    sent: list[Sent]
    order: list[Part]


class Assembly:
    """Adds pieces up, in the order in which a micro-batch runs them."""

    def __init__(self) -> None:
        self.base: Bytes = Counter()
        self.peak: Bytes = Counter()
        self.kept: Bytes = Counter()
        self._pieces: Counter[int] = Counter()
        self._by_id: dict[int, Piece] = {}
        self._order: list[tuple[int, bool]] = []

    def _note(self, piece: Piece) -> None:
        self._pieces[id(piece)] += 1
        self._by_id[id(piece)] = piece
        self._order.append((id(piece), True))

    def _reach(self, *parts: Bytes) -> None:
        total: Bytes = Counter(self.base)
        for part in parts:
            total.update(part)
        if sum(total.values()) > sum(self.peak.values()):
            self.peak = total

    def hold(self, held: Bytes) -> None:
        """Bytes that stay from here on."""
        self.base.update(held)

    def release(self, held: Bytes) -> None:
        """They go."""
        self.base.subtract(held)

    def drop(self, piece: Piece) -> None:
        """What a piece kept is gone."""
        self.base.subtract(piece.kept)

    def add_forward(self, piece: Piece) -> None:
        """A piece's forward."""
        self._reach(piece.forward)
        self.base.update(piece.kept)
        self._note(piece)

    def forward_is_over(self) -> None:
        """What is kept now waits for the backward."""
        self.kept = Counter(self.base)

    def add_both(self, piece: Piece) -> None:
        """A piece whose backward follows its forward."""
        self._reach(piece.forward)
        self._reach(piece.backward)
        self.base.update(piece.kept)
        self._note(piece)

    def add_backward(self, piece: Piece, pending: Bytes) -> None:
        """The backward of a piece whose forward was added."""
        self.base.subtract(piece.kept)
        self._reach(piece.backward, pending)
        self._order.append((id(piece), False))

    def finished(self) -> Stage:
        """The sums."""
        work, sent = [], []
        for key, count in self._pieces.items():
            piece = self._by_id[key]
            work += [dataclasses.replace(w, repeats=count) for w in piece.work]
            sent += [dataclasses.replace(s, repeats=count) for s in piece.sent]
        return Stage(self.kept, self.peak, work, sent, self._parts())

    def _parts(self) -> list[Part]:
        halves: dict[tuple[int, bool], Part] = {}
        later = {key for key, is_forward in self._order if not is_forward}
        for key, piece in self._by_id.items():
            work: dict[bool, list[Work]] = {True: [], False: []}
            sent: dict[bool, list[Sent]] = {True: [], False: []}
            for w in piece.work:  # without a backward of its own, everything is done at once
                work[w.phase == "forward" or key not in later].append(w)
            for s in piece.sent:
                sent[s.phase == "forward" or key not in later].append(s)
            for half in (True, False):
                halves[key, half] = Part(tuple(work[half]), tuple(sent[half]))
        return [halves[entry] for entry in self._order]
