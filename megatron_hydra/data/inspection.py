"""Inspect data: packs as text, a histogram of lengths, duplicates, and tokens with a loss."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from megatron_hydra.data.document import Document
from megatron_hydra.data.indexed import IndexedDocuments
from megatron_hydra.data.sources import IndexedSource
from megatron_hydra.files import write_figure_atomic

_SHOWN_DUPLICATES = 5
_SHOWN_PACKS = 5


def show_pack(
    documents: list[Document], sequence_length: int, tokenizer: Any, characters: int
) -> str:
    """One packed sequence as text, with the bounds of its documents.

    Args:
        documents: documents of the pack, in order.
        sequence_length: S.
        tokenizer: tokenizer for decoding.
        characters: number of characters to show of every document, half of its beginning and half of its end.
    """
    used = sum(len(document) for document in documents)
    padding = sequence_length - used
    lines = [
        f"{used:,} of {sequence_length:,} tokens, {len(documents)} documents, {padding} padding"
    ]
    start = 0
    for number, document in enumerate(documents):
        end = start + len(document)
        learned = int(document.trainable[1:].sum())
        lines.append(
            f"--- document {number}: tokens {start:,}..{end - 1:,}, {learned:,} learned ---"
        )
        lines.append(_shortened(tokenizer.decode(document.tokens.tolist()), characters))
        if learned < len(document) - 1:
            answers = tokenizer.decode(document.tokens[document.trainable].tolist())
            lines.append(f"    learned: {_shortened(answers, characters)!r}")
        start = end
    if padding:
        lines.append(f"--- padding: tokens {start:,}..{sequence_length - 1:,} ---")
    return "\n".join(lines)


def _shortened(text: str, characters: int) -> str:
    if len(text) <= characters:
        return text
    half = characters // 2
    return f"{text[:half]} [... {len(text) - 2 * half:,} characters ...] {text[-half:]}"


def plot_lengths(lengths: np.ndarray, sequence_length: int, title: str, path: str) -> None:
    """Plot histograms of document lengths, by documents and by tokens, as PNG.

    Args:
        lengths: tokens per document; empty documents are omitted.
        sequence_length: S, marked by a line.
        title: title of the picture.
        path: path of the PNG, which is written atomically.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    lengths = lengths[lengths > 0]
    edges = np.geomspace(1, max(int(lengths.max()), sequence_length) * 1.2, 60)
    figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for weights, label, color in (
        (np.full(len(lengths), 100 / len(lengths)), "share of documents", "#4477aa"),
        (lengths * (100 / lengths.sum()), "share of tokens", "#ee6677"),
    ):
        axis.hist(lengths, edges, weights=weights, label=label, color=color, alpha=0.6)
    axis.axvline(sequence_length, color="black", linestyle="--", linewidth=1)
    axis.text(sequence_length, axis.get_ylim()[1], f" {sequence_length:,}", va="top", fontsize=9)
    axis.set(xscale="log", xlabel="document length (tokens)", ylabel="% per bin", title=title)
    axis.legend(frameon=False, loc="upper left")
    try:
        write_figure_atomic(figure, path, dpi=120)
    finally:
        plt.close(figure)


def find_duplicates(
    documents: IndexedDocuments, most: int
) -> tuple[int, int, list[tuple[int, int]]]:
    """Exact duplicates among the first ``most`` documents (compared by 64-bit hash).

    Returns:
        Number of documents that repeat an earlier one, number of their tokens, and a few (earlier,
        later) pairs.
    """
    offsets, lengths = documents.document_spans()
    kept = np.flatnonzero(lengths > 0)[:most]
    hashes = np.empty(len(kept), dtype=np.uint64)
    for row, number in enumerate(kept.tolist()):
        raw = documents.read_raw(int(offsets[number]), int(lengths[number]))
        digest = hashlib.blake2b(raw.tobytes(), digest_size=8).digest()
        hashes[row] = int.from_bytes(digest, "little")
    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    earlier = first[inverse]
    repeats = np.flatnonzero(earlier != np.arange(len(kept)))
    pairs = [(int(kept[earlier[r]]), int(kept[r])) for r in repeats[:_SHOWN_DUPLICATES]]
    return len(repeats), int(lengths[kept[repeats]].sum()), pairs


def learned_in_packs(source: IndexedSource, most: int) -> np.ndarray:
    """Number of tokens with a loss in each of the first ``most`` packs of an epoch; int64 ``[packs]``.

    The first token of a piece has no loss, because no token comes before it. The tokens are not read.
    """
    documents = source.documents
    lengths = documents.sequence_lengths().astype(np.int64)
    modes = documents.sequence_modes() if documents.learned_spans else None
    is_learned = np.ones(len(lengths), bool) if modes is None else modes == 1
    starts = np.concatenate([[0], np.cumsum(lengths)])
    before = np.concatenate([[0], np.cumsum(lengths * is_learned)])

    def learned_before(token: np.ndarray) -> np.ndarray:
        sequence = np.searchsorted(starts, token, side="right") - 1
        within = np.append(is_learned, False)[sequence] * (token - starts[sequence])
        return before[sequence] + within

    counts = np.zeros(min(len(source.packs), most), dtype=np.int64)
    for number in range(len(counts)):
        begins, sizes = np.array(source.packs.pieces(number), dtype=np.int64).reshape(-1, 2).T
        counts[number] = (learned_before(begins + sizes) - learned_before(begins + 1)).sum()
    return counts


def describe_learning(learned: np.ndarray, packs: int) -> str:
    """One line: the number of packs without a token with a loss.

    Args:
        learned: result of :func:`learned_in_packs`.
        packs: number of packs of an epoch.
    """
    without = np.flatnonzero(learned == 0)
    among = f" (among the first {len(learned):,} only: --most)" if len(learned) < packs else ""
    shown = ", ".join(map(str, without[:_SHOWN_PACKS])) + (
        ", …" if len(without) > _SHOWN_PACKS else ""
    )
    numbers = f": numbers {shown}" if len(without) else ""
    share = len(without) / max(len(learned), 1)
    return f"packs without a learned token{among}: {len(without):,} of {len(learned):,} ({share:.2%}){numbers}"


def describe_lengths(lengths: np.ndarray) -> str:
    """Percentiles of document lengths, in one line."""
    lengths = lengths[lengths > 0]
    points = [0, 10, 50, 90, 99, 100]
    names = ["min", "10 %", "median", "90 %", "99 %", "max"]
    values = np.percentile(lengths, points)
    parts = [f"{n} {v:,.0f}" for n, v in zip(names, values, strict=True)]
    return f"tokens per document: {', '.join(parts)}, mean {lengths.mean():,.0f}"
