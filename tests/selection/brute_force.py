"""The interventions by full forwards of the Hugging Face model with hooks, one at a time.

It is independent of the engine: it shares only the prompts with :mod:`megatron_hydra.selection`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch

from megatron_hydra.selection.prompts import PromptPair

Cache = dict[str, torch.Tensor]


class BruteForce:
    """Interventions on one prompt pair."""

    def __init__(self, model: torch.nn.Module, pair: PromptPair) -> None:
        self.model, self.pair = model, pair
        self.heads = model.config.num_attention_heads
        self.attentions = [layer.self_attn for layer in model.model.layers]
        self.head_dim = self.attentions[0].head_dim
        self.clean_ids = pair.clean + pair.answer[:-1]
        self.corrupted_ids = pair.corrupted + pair.answer[:-1]
        self.clean, self.clean_m = self._record(self.clean_ids)
        self.corrupted, self.corrupted_m = self._record(self.corrupted_ids)

    def _readout(self, ids: tuple[int, ...]) -> torch.Tensor:
        """The span readout of equation 9."""
        logits = self.model(torch.tensor([ids]), use_cache=False).logits[0].double()
        total, weights = torch.zeros((), dtype=torch.float64), 0.0
        for j, (right, wrong) in enumerate(zip(self.pair.answer, self.pair.wrong, strict=True)):
            row = logits[len(self.pair.clean) - 1 + j]
            total = total + 0.9**j * (row[right] - row[wrong])
            weights += 0.9**j
        return total / weights

    def _forward(self, ids: tuple[int, ...]) -> float:
        with torch.no_grad():
            return float(self._readout(ids))

    @contextlib.contextmanager
    def _hooks(self):
        handles: list = []
        try:
            yield handles
        finally:
            for handle in handles:
                handle.remove()

    def _record(self, ids: tuple[int, ...]) -> tuple[Cache, float]:
        cache: Cache = {}

        def keep(name: str, before: bool) -> Callable:
            def hook(module, inputs, output=None):
                cache[name] = (inputs[0] if before else output).detach().clone()

            return hook

        with self._hooks() as handles:
            for i, layer in enumerate(self.model.model.layers):
                handles.append(
                    layer.self_attn.o_proj.register_forward_pre_hook(keep(f"z{i}", True))
                )
                handles.append(layer.mlp.register_forward_hook(keep(f"mlp{i}", False)))
            m = self._forward(ids)
        return cache, m

    def _freeze(self, handles: list, z: dict[int, torch.Tensor]) -> None:
        """All head outputs and MLPs have their corrupted values, except the o_proj inputs in ``z``."""
        for i, layer in enumerate(self.model.model.layers):
            value = z.get(i, self.corrupted[f"z{i}"])
            handles.append(
                layer.self_attn.o_proj.register_forward_pre_hook(lambda m, a, value=value: (value,))
            )
            frozen = self.corrupted[f"mlp{i}"]
            handles.append(layer.mlp.register_forward_hook(lambda m, a, o, frozen=frozen: frozen))

    def patched_z(self, layer: int, head: int) -> torch.Tensor:
        """The corrupted o_proj input of a layer with one head's clean output."""
        z = self.corrupted[f"z{layer}"].clone()
        columns = slice(head * self.head_dim, (head + 1) * self.head_dim)
        z[..., columns] = self.clean[f"z{layer}"][..., columns]
        return z

    def total(self, layer: int, head: int) -> float:
        """Everything downstream recomputes."""
        z = self.patched_z(layer, head)
        with self._hooks() as handles:
            projection = self.attentions[layer].o_proj
            handles.append(projection.register_forward_pre_hook(lambda m, a: (z,)))
            return self._forward(self.corrupted_ids)

    def layer(self, layer: int) -> float:
        """All heads of a layer at once; everything downstream recomputes."""
        z = self.clean[f"z{layer}"]
        with self._hooks() as handles:
            projection = self.attentions[layer].o_proj
            handles.append(projection.register_forward_pre_hook(lambda m, a: (z,)))
            return self._forward(self.corrupted_ids)

    def direct(self, layer: int, head: int) -> float:
        """Everything downstream is frozen."""
        with self._hooks() as handles:
            self._freeze(handles, {layer: self.patched_z(layer, head)})
            return self._forward(self.corrupted_ids)

    def slopes(self) -> list[torch.Tensor]:
        """∂m/∂(o_proj input) of every layer at the corrupted run, ``[1, T, H·d]``."""
        probes = [torch.zeros_like(self.corrupted[f"z{i}"]) for i in range(len(self.attentions))]
        with self._hooks() as handles:
            for probe, attention in zip(probes, self.attentions, strict=True):
                probe.requires_grad_()
                handles.append(
                    attention.o_proj.register_forward_pre_hook(lambda m, a, p=probe: (a[0] + p,))
                )
            return list(torch.autograd.grad(self._readout(self.corrupted_ids), probes))

    def path(self, layer: int, head: int, receivers: list[tuple[int, int]], inputs: str) -> float:
        """Sender (layer, head) → ``inputs`` (some of "qkv") of the receivers → logits."""
        new_z: dict[int, torch.Tensor] = {}
        for at, receiver in receivers:
            if at <= layer:
                continue
            heard = self._receiver_output(layer, head, at, inputs)
            z = new_z.setdefault(at, self.corrupted[f"z{at}"].clone())
            columns = slice(receiver * self.head_dim, (receiver + 1) * self.head_dim)
            z[..., columns] = heard[..., columns]
        with self._hooks() as handles:
            self._freeze(handles, new_z)
            return self._forward(self.corrupted_ids)

    def _receiver_output(self, layer: int, head: int, at: int, inputs: str) -> torch.Tensor:
        """The o_proj input of layer ``at`` if only its ``inputs`` see the sender."""
        attention = self.attentions[at]
        projections = {"q": attention.q_proj, "k": attention.k_proj, "v": attention.v_proj}
        seen: Cache = {}
        with self._hooks() as handles:  # the projections with the sender patched, all else frozen
            self._freeze(handles, {layer: self.patched_z(layer, head)})
            for name, module in projections.items():
                handles.append(
                    module.register_forward_hook(
                        lambda m, a, o, name=name: seen.__setitem__(name, o.detach().clone())
                    )
                )
            self._forward(self.corrupted_ids)
        with self._hooks() as handles:  # these projections in the corrupted run
            for name in inputs:
                handles.append(
                    projections[name].register_forward_hook(lambda m, a, o, name=name: seen[name])
                )
            handles.append(
                attention.o_proj.register_forward_pre_hook(
                    lambda m, a: seen.__setitem__("z", a[0].detach().clone())
                )
            )
            self._forward(self.corrupted_ids)
        return seen["z"]

    # -- the paper's interventions: corrupted into clean, MLPs live --------------------------------

    def _columns(self, head: int) -> slice:
        return slice(head * self.head_dim, (head + 1) * self.head_dim)

    def _noised_z(self, layer: int, head: int) -> torch.Tensor:
        """The clean o_proj input of a layer with one head's corrupted output."""
        z = self.clean[f"z{layer}"].clone()
        columns = self._columns(head)
        z[..., columns] = self.corrupted[f"z{layer}"][..., columns]
        return z

    def _hold(self, handles: list, z: dict[int, torch.Tensor], live: set[tuple[int, int]]) -> None:
        """All head outputs have their clean values, except those in ``z`` and the live ones; MLPs run."""

        def held(i: int) -> Callable:
            def hook(module, inputs):
                value = z.get(i, self.clean[f"z{i}"]).clone()
                for at, head in live:
                    if at == i:
                        value[..., self._columns(head)] = inputs[0][..., self._columns(head)]
                return (value,)

            return hook

        for i, attention in enumerate(self.attentions):
            handles.append(attention.o_proj.register_forward_pre_hook(held(i)))

    def receiver(self, layer: int, head: int) -> float:
        """m of the clean run with one head's corrupted output; later attention has its clean values."""
        with self._hooks() as handles:
            self._hold(handles, {layer: self._noised_z(layer, head)}, set())
            return self._forward(self.clean_ids)

    def sender(
        self,
        layer: int,
        head: int,
        newest: list[tuple[int, int]],
        older: list[tuple[int, int]],
    ) -> float:
        """m of the clean run if only the newest receivers read the candidate's corrupted output.

        Older receivers read what changes in the newest ones.
        """
        new_z: dict[int, torch.Tensor] = {}
        for at, receiver in newest:
            if at > layer:
                heard = self._heard_noise(layer, head, at)
                z = new_z.setdefault(at, self.clean[f"z{at}"].clone())
                z[..., self._columns(receiver)] = heard[..., self._columns(receiver)]
        with self._hooks() as handles:
            self._hold(handles, new_z, set(older))
            return self._forward(self.clean_ids)

    def _heard_noise(self, layer: int, head: int, at: int) -> torch.Tensor:
        """The o_proj input of layer ``at`` if all its inputs read the candidate."""
        seen: Cache = {}
        with self._hooks() as handles:
            handles.append(
                self.attentions[at].o_proj.register_forward_pre_hook(
                    lambda m, a: seen.__setitem__("z", a[0].detach().clone())
                )
            )
            self._hold(handles, {layer: self._noised_z(layer, head)}, set())
            self._forward(self.clean_ids)
        return seen["z"]

    def without(self, heads: list[tuple[int, int]], means: torch.Tensor) -> float:
        """m of the clean run if some heads give their mean output; everything downstream recomputes.

        Args:
            means: ``[L, H, d]``.
        """

        def knocked_out(i: int) -> Callable:
            def hook(module, inputs):
                z = inputs[0].clone()
                for layer, head in heads:
                    if layer == i:
                        z[..., self._columns(head)] = means[layer, head]
                return (z,)

            return hook

        with self._hooks() as handles:
            for i, attention in enumerate(self.attentions):
                handles.append(attention.o_proj.register_forward_pre_hook(knocked_out(i)))
            return self._forward(self.clean_ids)
