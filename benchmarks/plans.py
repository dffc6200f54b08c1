"""The table of `docs/distributed.md`: runs on 8 and on 64 H100s, planned and not measured.

    python -m benchmarks.plans

The language models are made of their published sizes, without weights, so that nothing is downloaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastsae.data.activations import decoder_layers
from fastsae.data.model_dtype import empty_model
from fastsae.train.config import TrainConfig
from fastsae.train.hardware import HARDWARE
from fastsae.train.plan import Model, Plan, make_plan

TOKENS_OF_A_PROCESS = 1024  # in a step
TOKENS = 10**9


@dataclass(frozen=True)
class Run:
    """An SAE on a language model of known sizes."""

    name: str
    layer: int
    d_sae: int
    config_class: str  # a class of transformers
    sizes: dict[str, Any]

    def model(self) -> Model:
        """The language model in 16 bits, as a plan takes it; all its blocks are alike, so that one of them is enough."""
        import transformers

        config = getattr(transformers, self.config_class)(**{**self.sizes, "num_hidden_layers": 1})
        model = empty_model(config)
        n_block, n_weights = (sum(p.numel() for p in part.parameters()) for part in (decoder_layers(model), model))
        n_all = n_weights + (self.sizes["num_hidden_layers"] - 1) * n_block
        return Model(self.sizes["hidden_size"], (self.layer + 1) * n_block, n_all, 2)

    def plan(self, model: Model, n_processes: int, n_sharing: int) -> Plan:
        """Its plan on so many processes, of which so many share the features."""
        batch = n_processes * TOKENS_OF_A_PROCESS
        config = TrainConfig(
            d_sae=self.d_sae, batch_size=batch, buffer_tokens=16 * batch, tokens=TOKENS, target_l0=64.0, dtype="bfloat16",
            shard_features=n_sharing,
        )  # fmt: skip
        return make_plan([config], model, n_processes)


RUNS = (
    Run("gemma-2-2b, layer 12, 65,536 features", 12, 65_536, "Gemma2Config", {
        "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 256_000,
    }),
    Run("llama-3.1-8b, layer 16, 131,072 features (x32)", 16, 131_072, "LlamaConfig", {
        "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128_256,
    }),
    Run("Qwen2.5-7B, layer 14, 1,048,576 features", 14, 1_048_576, "Qwen2Config", {
        "hidden_size": 3584, "intermediate_size": 18_944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "vocab_size": 152_064,
    }),
)  # fmt: skip
# processes, and how many of them share the features: none, those of a machine, all
WAYS = ((8, 1), (8, 8), (64, 1), (64, 8), (64, 64))


def table() -> str:
    """The table, in Markdown."""
    hardware = HARDWARE["h100"]
    assert hardware.memory is not None
    lines = [
        "| run | H100s | features shared by | GB a GPU | MB sent in a step | ms a step, of it computing | hours for 1e9 tokens |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for run in RUNS:
        model = run.model()
        for n_processes, n_sharing in WAYS:
            plan = run.plan(model, n_processes, n_sharing)
            seconds, computed = plan.seconds(hardware), sum(part.seconds(hardware) for part in plan.parts)
            gigabytes, fits = f"{plan.n_bytes / 1e9:.1f}", plan.n_bytes <= hardware.memory
            cells = (
                run.name,
                n_processes,
                "none: data parallel" if n_sharing == 1 else n_sharing,
                gigabytes if fits else f"**{gigabytes}**",
                f"{plan.sent / 1e6:,.0f}",
                f"{1e3 * seconds:.1f}, {1e3 * computed:.1f}",
                f"{seconds * plan.config.steps / 3600:.2f}" if fits else "does not fit",
            )
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
