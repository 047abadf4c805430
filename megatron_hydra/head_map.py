"""The head map: the file that says which query heads keep full attention (design §3).

It connects selection, conversion, training and export. All code reads it by :meth:`HeadMap.load` and
:meth:`HeadMap.check_model`.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import json
import logging
import math
import operator
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_hydra.errors import HydraError
from megatron_hydra.files import JsonFormat, read_json, write_json_atomic

FORMAT = JsonFormat("hydra-head-map", 1, "head map")

DEFAULT_STRATEGY = "global_interp_c"
"""The default selection strategy."""

OLD_STRATEGY_NAMES = {
    "interp": "global_interp",
    "random": "global_random",
    "uniform": "layer_random",
    "per_layer_quota": "layer_interp",
}
"""Old names of strategies, which maps and experiment files may still have; today's names are the paper's."""

_log = logging.getLogger(__name__)


def strategy_name(name: str) -> str:
    """A strategy's name in the paper; an old name is accepted with a log message."""
    if name in OLD_STRATEGY_NAMES:
        _warn_renamed(name)
    return OLD_STRATEGY_NAMES.get(name, name)


@functools.cache
def _warn_renamed(old: str) -> None:
    """Log it once for each process, because every row of an experiment names its strategy."""
    _log.warning("strategy %s was renamed to %s, as in the paper", old, OLD_STRATEGY_NAMES[old])


@dataclasses.dataclass(frozen=True)
class ModelIdentity:
    """The model of a head map; every field except ``name`` and ``revision`` must match at use.

    Attributes:
        name: source of the model (a path or a Hub name); informative only.
        revision: Hub revision, or ``""``.
        family: ``qwen3``, ``qwen2`` or ``llama``.
        num_layers, num_query_heads, num_kv_heads, head_dim, hidden_size: the model's shape.
        fingerprint: hash of weights of the heads (see :func:`fingerprint_tensors`), or ``""`` if the map does
            not depend on weights.
    """

    name: str
    revision: str
    family: str
    num_layers: int
    num_query_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    fingerprint: str = ""


DEFAULT_RATIO = "3:1"
"""GDN:FA, the paper's default; the paper's aggressive ratio is 7:1."""


def parse_ratio(text: str) -> int | None:
    """Read a GDN:FA ratio such as ``"7:1"``.

    Returns:
        ``r`` of ``r:1``; ``0`` for ``"dense"`` (every head FA); ``None`` for ``"all-gdn"``.

    Raises:
        HydraError: the text is not a ratio.
    """
    if text == "all-gdn":
        return None
    if text == "dense":
        return 0
    left, colon, right = text.partition(":")
    if not colon or not left.isdecimal() or right != "1":
        raise HydraError(
            f"ratio {text!r} is not understood: write GDN:FA as 'r:1', for example 7:1; "
            "'dense' keeps every head FA, 'all-gdn' keeps none"
        )
    return int(left)


def num_full_attention_heads(num_layers: int, num_query_heads: int, ratio: str) -> int:
    """Number of FA heads at a ratio: round(L·H / (r+1)), at least one for any ``r:1``."""
    r = parse_ratio(ratio)
    if r is None:
        return 0
    total = num_layers * num_query_heads
    return max(1, math.floor(total / (r + 1) + 0.5))


def whole_layers(
    num_layers: int,
    num_query_heads: int,
    num_full_attention: int,
    scores: Sequence[float] | None = None,
) -> tuple[tuple[int, ...], ...]:
    """FA layers, with a number of heads as near to the given one as possible; at least one layer for any head.

    Args:
        scores: of each layer; layers with the highest scores are FA. ``None``: layers at equal distances, the
            last one of each block of equal size (three linear layers, then a full one, as in Qwen3-Next).

    Returns:
        For each layer, all of its heads or none.
    """
    nearest = (2 * num_full_attention + num_query_heads) // (2 * num_query_heads)
    count = max(1, nearest) if num_full_attention else 0
    if scores is None:
        full = {(i + 1) * num_layers // count - 1 for i in range(count)}
    else:
        full = set(sorted(range(num_layers), key=lambda layer: -scores[layer])[:count])
    everything = tuple(range(num_query_heads))
    return tuple(everything if layer in full else () for layer in range(num_layers))


def fingerprint_tensors(tensors: Mapping[str, Any]) -> str:
    """SHA-256 of names, shapes and float32 bytes of a few torch tensors; it does not depend on the dict's
    order.

    Callers pass the attention projections of the first and last layers. They distinguish two checkpoints
    without reading tens of gigabytes.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().to("cpu").float().contiguous()
        digest.update(f"{name}:{tuple(tensor.shape)}".encode())
        digest.update(tensor.numpy().tobytes())
    return "sha256:" + digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class HeadMap:
    """The heads that keep full attention, and how they were chosen.

    Attributes:
        model: the model this map is for.
        full_attention_heads: for each layer, the sorted original indices of its FA heads.
        strategy: name of the selection strategy (``global_interp_c``, ``global_random``, ...); old maps may
            have a name of :data:`OLD_STRATEGY_NAMES`.
        ratio: the requested GDN:FA ratio, e.g. ``"7:1"``.
        seed: seed of the strategy and of its prompts.
        granularity: ``query_head`` or ``kv_group``.
        prompts_fingerprint: hash of the prompts used, or ``""``.
        scores: capability -> ``[layer][head]`` scores of the strategy.
        ranking: all heads ``[layer, head]``, best first; may be empty for maps without ranking.
        details: strategy-specific facts (dropped prompts, receivers and senders, options).
    """

    model: ModelIdentity
    full_attention_heads: tuple[tuple[int, ...], ...]
    strategy: str
    ratio: str
    seed: int = 0
    granularity: str = "query_head"
    prompts_fingerprint: str = ""
    scores: dict[str, list[list[float]]] = dataclasses.field(default_factory=dict)
    ranking: tuple[tuple[int, int], ...] = ()
    details: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        heads = tuple(tuple(map(_index, layer)) for layer in self.full_attention_heads)
        object.__setattr__(self, "full_attention_heads", heads)
        ranking = tuple((_index(layer), _index(head)) for layer, head in self.ranking)
        object.__setattr__(self, "ranking", ranking)
        self._validate("head map")

    @classmethod
    def of_heads(
        cls, model: ModelIdentity, heads: Sequence[tuple[int, int]], strategy: str
    ) -> HeadMap:
        """A map of given FA heads ``(layer, head)``; its ratio is the nearest ``r:1``.

        Raises:
            HydraError: a head does not exist, is given twice, or no head is given.
        """
        if not heads:
            raise HydraError("head map: no head is given")
        if repeated := [head for head, n in collections.Counter(heads).items() if n > 1]:
            raise HydraError("head map: {}.{} is given twice".format(*repeated[0]))
        if missing := [layer for layer, _ in heads if not 0 <= layer < model.num_layers]:
            raise HydraError(
                f"head map: layer {missing[0]} does not exist (the model has layers "
                f"0..{model.num_layers - 1})"
            )
        layers = tuple(
            tuple(sorted(h for layer, h in heads if layer == index))
            for index in range(model.num_layers)
        )
        rest = model.num_layers * model.num_query_heads - len(heads)
        ratio = f"{max(1, round(rest / len(heads)))}:1" if rest else "dense"
        return cls(model=model, full_attention_heads=layers, strategy=strategy, ratio=ratio)

    # -- reading ------------------------------------------------------------------------------

    @property
    def num_full_attention(self) -> int:
        """Number of FA heads in all layers."""
        return sum(len(layer) for layer in self.full_attention_heads)

    def gated_delta_net_heads(self, layer: int) -> tuple[int, ...]:
        """Original indices of the layer's GDN heads (those that are not FA), ascending."""
        chosen = set(self.full_attention_heads[layer])
        return tuple(h for h in range(self.model.num_query_heads) if h not in chosen)

    # -- checks -------------------------------------------------------------------------------

    def _validate(self, source: str) -> None:
        m = self.model
        if len(self.full_attention_heads) != m.num_layers:
            raise HydraError(
                f"{source}: full_attention_heads has {len(self.full_attention_heads)} layers, "
                f"its model has {m.num_layers}"
            )
        if m.num_kv_heads < 1 or m.num_query_heads % m.num_kv_heads:
            raise HydraError(
                f"{source}: {m.num_query_heads} query heads are not a multiple of "
                f"{m.num_kv_heads} key-value heads"
            )
        if self.granularity not in ("query_head", "kv_group"):
            raise HydraError(
                f"{source}: granularity {self.granularity!r} must be query_head or kv_group"
            )
        for layer, heads in enumerate(self.full_attention_heads):
            self._validate_layer(f"{source}: layer {layer}", heads)
        self._validate_scores(source)
        parse_ratio(self.ratio)

    def _validate_layer(self, source: str, heads: tuple[int, ...]) -> None:
        m = self.model
        if list(heads) != sorted(set(heads)):
            raise HydraError(f"{source}: heads {list(heads)} must be sorted, no repeats")
        bad = [h for h in heads if not 0 <= h < m.num_query_heads]
        if bad:
            raise HydraError(
                f"{source}: head {bad[0]} does not exist "
                f"(the model has heads 0..{m.num_query_heads - 1})"
            )
        if self.granularity == "kv_group":
            size = m.num_query_heads // m.num_kv_heads
            counts = collections.Counter(h // size for h in heads)
            partial = [group for group, count in counts.items() if count != size]
            if partial:
                raise HydraError(
                    f"{source}: granularity is kv_group, but only some heads of "
                    f"KV group {min(partial)} are FA"
                )

    def _validate_scores(self, source: str) -> None:
        """Check that ranking and scores are for this model's layers and heads."""
        m = self.model
        for layer, head in self.ranking:
            if not (0 <= layer < m.num_layers and 0 <= head < m.num_query_heads):
                raise HydraError(
                    f"{source}: ranking: [{layer}, {head}] does not exist (the model has "
                    f"{m.num_layers} layers of {m.num_query_heads} heads)"
                )
        if len(set(self.ranking)) != len(self.ranking):
            raise HydraError(f"{source}: ranking: a head appears twice")
        for name, rows in self.scores.items():
            if [len(row) for row in rows] != [m.num_query_heads] * m.num_layers:
                raise HydraError(
                    f"{source}: scores of {name!r} are not {m.num_layers} layers of "
                    f"{m.num_query_heads} heads"
                )

    def check_model(self, other: ModelIdentity, source: str = "head map") -> None:
        """Refuse a map for another model.

        Args:
            other: the current model. If one fingerprint is empty, fingerprints are not compared.
            source: the file's name, for the message.

        Raises:
            HydraError: naming the first field that differs.
        """
        for field in (
            "family",
            "num_layers",
            "num_query_heads",
            "num_kv_heads",
            "head_dim",
            "hidden_size",
        ):
            mine, theirs = getattr(self.model, field), getattr(other, field)
            if mine != theirs:
                raise HydraError(
                    f"{source} was made for another model ({self.model.name}): its {field} is "
                    f"{mine}, that of {other.name} is {theirs}; make a map for this model with "
                    "tools/select_heads.py"
                )
        mine, theirs = self.model.fingerprint, other.fingerprint
        if mine and theirs and mine != theirs:
            raise HydraError(
                f"{source} was made for another model ({self.model.name}): same shape, other "
                f"weights (fingerprint {mine[:19]}…, {other.name} has {theirs[:19]}…); make a map "
                "for this model with tools/select_heads.py"
            )

    # -- the file -----------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, with ``format`` and ``version``."""
        body = dataclasses.asdict(self)
        body["full_attention_heads"] = [list(x) for x in self.full_attention_heads]
        body["ranking"] = [list(x) for x in self.ranking]
        return FORMAT.add_header(body)

    @classmethod
    def from_dict(cls, body: Mapping[str, Any], source: str = "head map") -> HeadMap:
        """Inverse of :meth:`to_dict`.

        Raises:
            HydraError: another format or version, a missing or unknown key, an invalid head.
        """
        body = FORMAT.without_header(body, source)
        model_body = body.pop("model", None)
        known = {f.name for f in dataclasses.fields(cls)} - {"model"}
        _check_keys(body, known, ("full_attention_heads", "strategy", "ratio"), source)
        model_fields = [f.name for f in dataclasses.fields(ModelIdentity)]
        if not isinstance(model_body, Mapping):
            raise HydraError(f"{source}: key 'model' is missing or not an object")
        _check_keys(model_body, set(model_fields), model_fields[:-1], f"{source}: model")
        try:
            return cls(model=ModelIdentity(**model_body), **body)
        except HydraError as error:
            raise HydraError(f"{source}: {error}") from None
        except (AttributeError, TypeError, ValueError) as error:
            raise HydraError(f"{source}: a value has the wrong type: {error}") from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file atomically, one layer for each line.

        Raises:
            HydraError: the file cannot be written.
        """
        try:
            write_json_atomic(path, self.to_dict())
        except OSError as error:
            raise HydraError(f"head map {path} cannot be written: {error}") from None

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> HeadMap:
        """Read and validate a file.

        Raises:
            HydraError: no such file, no JSON, or not a valid head map; names the file.
        """
        if not Path(path).exists():
            raise HydraError(f"head map {path} does not exist; make one with tools/select_heads.py")
        return cls.from_dict(read_json(path), source=str(path))

    def fingerprint(self) -> str:
        """Hash of heads and model only, not of the way in which the map was made."""
        body = {
            "heads": [list(x) for x in self.full_attention_heads],
            "model": dataclasses.asdict(self.model) | {"name": "", "revision": ""},
        }
        return "sha256:" + hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _index(value: Any) -> int:
    """An index; fractions, truth values and characters are refused, not converted."""
    if isinstance(value, bool):
        raise TypeError(f"{value} is no index")
    return operator.index(value)


def _check_keys(body: Mapping, known: set[str], required: Sequence[str], source: str) -> None:
    missing = [key for key in required if key not in body]
    if missing:
        raise HydraError(f"{source}: key {missing[0]!r} is missing")
    extra = sorted(set(body) - known)
    if extra:
        raise HydraError(f"{source}: key {extra[0]!r} is unknown")
