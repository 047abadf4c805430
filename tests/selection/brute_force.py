"""The same interventions by full forwards of the Hugging Face model with plain hooks, one at a
time.

Independent of the engine: it shares no code with :mod:`megatron_hydra.selection` but the prompts.
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
        self.clean, self.clean_m = self._record(pair.clean)
        self.corrupted, self.corrupted_m = self._record(pair.corrupted)

    def _forward(self, ids: tuple[int, ...]) -> float:
        with torch.no_grad():
            logits = self.model(torch.tensor([ids]), use_cache=False).logits[0, -1].double()
        return float(logits[self.pair.answer] - logits[self.pair.wrong])

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
        """All head outputs and MLPs at their corrupted values, but the o_proj inputs in ``z``."""
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
        """Everything downstream free."""
        z = self.patched_z(layer, head)
        with self._hooks() as handles:
            projection = self.attentions[layer].o_proj
            handles.append(projection.register_forward_pre_hook(lambda m, a: (z,)))
            return self._forward(self.pair.corrupted)

    def layer(self, layer: int) -> float:
        """All heads of a layer at once, everything downstream free."""
        z = self.clean[f"z{layer}"]
        with self._hooks() as handles:
            projection = self.attentions[layer].o_proj
            handles.append(projection.register_forward_pre_hook(lambda m, a: (z,)))
            return self._forward(self.pair.corrupted)

    def direct(self, layer: int, head: int) -> float:
        """Everything downstream frozen."""
        with self._hooks() as handles:
            self._freeze(handles, {layer: self.patched_z(layer, head)})
            return self._forward(self.pair.corrupted)

    def slopes(self) -> list[torch.Tensor]:
        """∂m/∂(o_proj input) of every layer at the corrupted run, ``[1, T, H·d]``."""
        probes = [torch.zeros_like(self.corrupted[f"z{i}"]) for i in range(len(self.attentions))]
        with self._hooks() as handles:
            for probe, attention in zip(probes, self.attentions, strict=True):
                probe.requires_grad_()
                handles.append(
                    attention.o_proj.register_forward_pre_hook(lambda m, a, p=probe: (a[0] + p,))
                )
            logits = self.model(torch.tensor([self.pair.corrupted]), use_cache=False).logits[0, -1]
            m = logits[self.pair.answer] - logits[self.pair.wrong]
            return list(torch.autograd.grad(m, probes))

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
            return self._forward(self.pair.corrupted)

    def _receiver_output(self, layer: int, head: int, at: int, inputs: str) -> torch.Tensor:
        """o_proj input of layer ``at`` when its ``inputs`` see the sender and the others do not."""
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
            self._forward(self.pair.corrupted)
        with self._hooks() as handles:  # those projections put into the corrupted run
            for name in inputs:
                handles.append(
                    projections[name].register_forward_hook(lambda m, a, o, name=name: seen[name])
                )
            handles.append(
                attention.o_proj.register_forward_pre_hook(
                    lambda m, a: seen.__setitem__("z", a[0].detach().clone())
                )
            )
            self._forward(self.pair.corrupted)
        return seen["z"]
