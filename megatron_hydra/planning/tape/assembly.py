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
        forward, backward: peak bytes of each, by part.
        work, sent: of both.
    """

    kept: Bytes
    forward: Bytes
    backward: Bytes
    work: tuple[Work, ...]
    sent: tuple[Sent, ...]


@dataclasses.dataclass(frozen=True)
class Part:
    """Work of a piece that runs without interruption: its forward, its backward (with recomputation), or both
    if the backward follows at once.
    """

    work: tuple[Work, ...]
    sent: tuple[Sent, ...]

    def forward(self) -> Part:
        """Only its forward, as in a validation."""
        return Part(
            tuple(w for w in self.work if w.phase == "forward"),
            tuple(s for s in self.sent if s.phase == "forward"),
        )


@dataclasses.dataclass
class Stage:
    """Memory and work of one micro-batch on a stage.

    Attributes:
        kept: bytes from the end of its forward to its backward, by part.
        peak: peak bytes by part, with kept ones.
        work, sent: each with its number of occurrences.
        order: the pieces' forwards and backwards in their order.
    """

    kept: Bytes
    peak: Bytes
    work: list[Work]
    sent: list[Sent]
    order: list[Part]


class Assembly:
    """Adds pieces in the order in which a micro-batch runs them."""

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
        """Add bytes that stay from here on."""
        self.base.update(held)

    def release(self, held: Bytes) -> None:
        """Remove these bytes."""
        self.base.subtract(held)

    def drop(self, piece: Piece) -> None:
        """Remove the bytes that a piece kept."""
        self.base.subtract(piece.kept)

    def add_forward(self, piece: Piece) -> None:
        """Add a piece's forward."""
        self._reach(piece.forward)
        self.base.update(piece.kept)
        self._note(piece)

    def forward_is_over(self) -> None:
        """Mark that all kept bytes now wait for the backward."""
        self.kept = Counter(self.base)

    def add_both(self, piece: Piece) -> None:
        """Add a piece whose backward follows its forward at once."""
        self._reach(piece.forward)
        self._reach(piece.backward)
        self.base.update(piece.kept)
        self._note(piece)

    def add_backward(self, piece: Piece, pending: Bytes) -> None:
        """Add the backward of a piece whose forward was added before."""
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
            for w in piece.work:  # without a backward of its own, all work is in one place
                work[w.phase == "forward" or key not in later].append(w)
            for s in piece.sent:
                sent[s.phase == "forward" or key not in later].append(s)
            for half in (True, False):
                halves[key, half] = Part(tuple(work[half]), tuple(sent[half]))
        return [halves[entry] for entry in self._order]
