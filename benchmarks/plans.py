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
    config_class: str
    sizes: dict[str, Any]
    layer: int
    d_sae: int

    def model(self) -> Model:
        """The language model in 16 bits, as a plan takes it; all its blocks are alike, so that one of them is enough."""
        import transformers

        config = getattr(transformers, self.config_class)(**{**self.sizes, "num_hidden_layers": 1})
        model = empty_model(config)
        n_block, n_weights = (sum(p.numel() for p in part.parameters()) for part in (decoder_layers(model), model))
        n_all = n_weights + (self.sizes["num_hidden_layers"] - 1) * n_block
        return Model(self.sizes["hidden_size"], (self.layer + 1) * n_block, n_all, 2)


RUNS = (
    Run(
        "gemma-2-2b, layer 12, 65,536 features",
        "Gemma2Config",
        {
            "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8,
            "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 256_000,
        },
        12,
        65_536,
    ),
    Run(
        "llama-3.1-8b, layer 16, 131,072 features (x32)",
        "LlamaConfig",
        {
            "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "num_attention_heads": 32,
            "num_key_value_heads": 8, "vocab_size": 128_256,
        },
        16,
        131_072,
    ),
    Run(
        "Qwen2.5-7B, layer 14, 1,048,576 features",
        "Qwen2Config",
        {
            "hidden_size": 3584, "intermediate_size": 18_944, "num_hidden_layers": 28, "num_attention_heads": 28,
            "num_key_value_heads": 4, "vocab_size": 152_064,
        },
        14,
        1_048_576,
    ),
)  # fmt: skip


def plans(run: Run) -> list[Plan]:
    """Its plans on 8 and on 64 processes: data parallel, and with features shared by a machine, and by all."""
    model, found = run.model(), []
    for n in (8, 64):
        batch = n * TOKENS_OF_A_PROCESS
        for n_shards in sorted({1, 8, n}):
            config = TrainConfig(
                d_sae=run.d_sae,
                batch_size=batch,
                buffer_tokens=16 * batch,
                tokens=TOKENS,
                target_l0=64.0,
                dtype="bfloat16",
                shard_features=n_shards,
            )
            found.append(make_plan([config], model, n))
    return found


def table() -> str:
    """The table, in Markdown."""
    hardware = HARDWARE["h100"]
    assert hardware.memory is not None
    lines = [
        "| run | H100s | features shared by | GB a GPU | MB sent in a step | ms a step, of it computing | hours for 1e9 tokens |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for run in RUNS:
        for plan in plans(run):
            seconds, computed = plan.seconds(hardware), sum(part.seconds(hardware) for part in plan.parts)
            n_shards, fits = plan.config.shard_features, plan.n_bytes <= hardware.memory
            hours = f"{seconds * plan.config.steps / 3600:.2f}"
            cells = (
                run.name,
                plan.n_processes,
                "none: data parallel" if n_shards == 1 else n_shards,
                f"{plan.n_bytes / 1e9:.1f}" if fits else f"**{plan.n_bytes / 1e9:.1f}**",
                f"{plan.sent / 1e6:,.0f}",
                f"{1e3 * seconds:.1f}, {1e3 * computed:.1f}",
                hours if fits else "does not fit",
            )
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
