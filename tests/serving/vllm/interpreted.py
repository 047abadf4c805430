"""An engine whose layers run their fused kernels in Triton's interpreter, on a CPU and in fp32.

``TRITON_INTERPRET=1 python -m tests.serving.vllm.interpreted FOLDER`` writes an export into FOLDER and compares
vLLM's answers with it. The delta rule and the convolution are torch's.
"""

from __future__ import annotations

import sys
from pathlib import Path

from megatron_hydra.serving.vllm import kernels
from tests.serving.vllm import engines

HEADS = [[1, 2, 3], [], [0, 1, 2, 3, 4, 5]]
SWITCHES = {"fusion": "gated", "gdn_kv": "gqa", "fa_position": "both"}


def main(folder: Path) -> None:
    engines.need_vllm()
    from megatron_hydra.serving.vllm import attention, gated_delta_net

    for module in (attention, gated_delta_net):
        module.layer_kernels = lambda x: kernels._fused()
    model = engines.save_export(folder, HEADS, hydra=SWITCHES)
    prompts = engines.random_prompts((1, 3, 37))
    with engines.engine(folder) as llm:
        for prompt, answer in zip(prompts, engines.generate(llm, prompts, 4), strict=True):
            engines.check(model, prompt, answer, 5e-5)
    print("as expected")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
