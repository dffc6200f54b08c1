"""SAELens' training command line, accelerated: `python -m sae_lens.llm_sae_training_runner` with the same arguments.

    python examples/saelens_command_line.py --architecture jumprelu --model_name gpt2 --hook_name blocks.6.hook_resid_pre \\
        --d_in 768 --d_sae 16384 --dataset_path NeelNanda/c4-10k --output_path my-sae
"""

from __future__ import annotations

import runpy

import sae_lens

import fastsae

if __name__ == "__main__":
    handle = fastsae.accelerate(sae_lens)  # every SAE and trainer that SAELens makes from now on
    runpy.run_module("sae_lens.llm_sae_training_runner", run_name="__main__")
    print(handle.report())
