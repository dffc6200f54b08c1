"""SAEs written by hand as each library writes them, and what that library computes, by its own formulas in float64."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

D_IN, D_SAE, K = 6, 20, 4
IN_NORM, OUT_NORM = 5.0, 3.0


class PeerFile(NamedTuple):
    """A saved SAE and what its library computes."""

    path: Path
    encode: Callable[[Tensor], Tensor]
    forward: Callable[[Tensor], Tensor]


class Weights(NamedTuple):
    """Numbers that float32 holds, so that nothing is rounded on the way."""

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    threshold: Tensor


def weights(seed: int = 0, *, unit_norm: bool = False) -> Weights:
    """Random ones, `b_dec` far from zero; `W_enc` is `[D_IN, D_SAE]`."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    W_dec = draw(D_SAE, D_IN)
    W_dec = W_dec / W_dec.norm(dim=1, keepdim=True) if unit_norm else W_dec
    return Weights(draw(D_IN, D_SAE), draw(D_SAE) / 4, W_dec, draw(D_IN) + 1, draw(D_SAE).abs() / 2)


def top(h: Tensor, k: int = K) -> Tensor:
    kept = h.topk(k, dim=-1)
    return torch.zeros_like(h).scatter_(-1, kept.indices, kept.values.relu())


def peer_file(
    path: Path, gate: Callable[[Tensor], Tensor], w: Weights, *, applied: bool, skip: Tensor | None = None
) -> PeerFile:
    """With the formula that most libraries share."""
    W_enc, b_enc, W_dec, b_dec = (tensor.double() for tensor in w[:4])

    def encode(x: Tensor) -> Tensor:
        return gate((x - b_dec if applied else x) @ W_enc + b_enc)

    def forward(x: Tensor) -> Tensor:
        out = encode(x) @ W_dec + b_dec
        return out if skip is None else out + x @ skip.double().t()

    return PeerFile(path, encode, forward)


def jump(threshold: Tensor | float) -> Callable[[Tensor], Tensor]:
    return lambda h: h * (h > threshold)


def linear(w: Weights, encoder: str = "encoder", decoder: str = "decoder") -> dict[str, Tensor]:
    """A state dict of two linear layers, whose weights are `[out, in]`."""
    return {
        f"{encoder}.weight": w.W_enc.t().contiguous(),
        f"{encoder}.bias": w.b_enc,
        f"{decoder}.weight": w.W_dec.t().contiguous(),
        f"{decoder}.bias": w.b_dec,
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def saelens(root: Path, architecture: str = "jumprelu", **options: Any) -> PeerFile:
    w = weights()
    write_json(
        root / "cfg.json",
        {
            "architecture": architecture,
            "d_in": D_IN,
            "d_sae": D_SAE,
            "dtype": "float32",
            "device": "cpu",
            "apply_b_dec_to_input": True,
            "normalize_activations": "none",
            "reshape_activations": "none",
            "metadata": {"sae_lens_version": "6.54.12", "hook_name": "blocks.3.hook_resid_post"},
            **({"k": K} if architecture == "topk" else {}),
            **options,
        },
    )
    state = {"W_enc": w.W_enc, "b_enc": w.b_enc, "W_dec": w.W_dec, "b_dec": w.b_dec}
    state |= {"threshold": w.threshold} if architecture == "jumprelu" else {}
    save_file(state, root / "sae_weights.safetensors")
    gates = {"jumprelu": jump(w.threshold.double()), "topk": top, "standard": torch.relu}
    return peer_file(root, gates[architecture], w, applied=True)


def saelens_legacy(root: Path) -> PeerFile:
    w = weights(1)
    old = {"d_in": D_IN, "d_sae": D_SAE, "dtype": "torch.float32", "device": "cuda", "activation_fn_str": "relu"}
    old |= {
        "hook_point": "blocks.3.hook_resid_post",
        "model_name": "gpt2",
        "normalize_activations": False,
        "context_size": 128,
    }
    write_json(root / "cfg.json", {**old, "apply_b_dec_to_input": True, "sae_lens_training_version": "3.2.1"})
    state = {
        "W_enc": w.W_enc,
        "b_enc": w.b_enc,
        "W_dec": w.W_dec,
        "b_dec": w.b_dec,
        "scaling_factor": torch.ones(D_SAE),
    }
    save_file(state, root / "sae_weights.safetensors")
    return peer_file(root, torch.relu, w, applied=True)


def gemma_scope(root: Path) -> PeerFile:
    w = weights(2, unit_norm=True)
    folder = root / "gemma-scope-2b-pt-res" / "layer_20" / "width_16k" / "average_l0_71"
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", **{name: tensor.numpy() for name, tensor in w._asdict().items()})
    return peer_file(folder, jump(w.threshold.double()), w, applied=False)


def gemma_scope_embedding(root: Path) -> PeerFile:
    w = weights(2, unit_norm=True)
    folder = root / "embedding" / "width_4k" / "average_l0_6"
    folder.mkdir(parents=True)
    np.savez_compressed(folder / "params.npz", **{name: tensor.numpy() for name, tensor in w._asdict().items()})
    scaled = w._replace(W_enc=w.W_enc.double() / math.sqrt(D_IN), W_dec=w.W_dec.double() * math.sqrt(D_IN))
    return peer_file(folder, jump(w.threshold.double()), scaled, applied=False)


def gemma_scope_2(root: Path) -> PeerFile:
    w = weights(3)
    folder = root / "resid_post" / "layer_12_width_16k_l0_small"
    hooks = {"hf_hook_point_in": "model.layers.12.output", "model_name": "gemma-v3-270m-pt"}
    write_json(folder / "config.json", {"architecture": "jump_relu", **hooks})
    save_file({name.replace("W_", "w_"): tensor for name, tensor in w._asdict().items()}, folder / "params.safetensors")
    return peer_file(folder, jump(w.threshold.double()), w, applied=False)


def gemma_scope_2_affine(root: Path) -> PeerFile:
    w, skip = weights(4), torch.randn(D_IN, D_IN, generator=torch.Generator().manual_seed(4))
    folder = root / "transcoder" / "layer_12_width_16k_l0_small_affine"
    hooks = {"hf_hook_point_in": "a", "hf_hook_point_out": "b", "model_name": "gemma-v3-270m-pt"}
    write_json(folder / "config.json", {"architecture": "jump_relu", "affine_connection": True, **hooks})
    state = {name.replace("W_", "w_"): tensor for name, tensor in w._asdict().items()}
    save_file({**state, "affine_skip_connection": skip}, folder / "params.safetensors")
    return peer_file(folder, jump(w.threshold.double()), w, applied=False, skip=skip.t())


def sparsify(root: Path, *, transcode: bool = False, num_latents: int = D_SAE) -> PeerFile:
    w, folder = weights(5), root / "layers.3"
    skip = torch.randn(D_IN, D_IN, generator=torch.Generator().manual_seed(5)) if transcode else None
    config = {
        "activation": "topk",
        "normalize_decoder": True,
        "num_latents": num_latents,
        "k": K,
        "multi_topk": False,
        "d_in": D_IN,
    }
    config |= {"expansion_factor": 32, "skip_connection": transcode, "transcode": transcode}
    write_json(folder / "cfg.json", config)
    state = {"encoder.weight": w.W_enc.t().contiguous(), "encoder.bias": w.b_enc, "W_dec": w.W_dec, "b_dec": w.b_dec}
    save_file(state | ({} if skip is None else {"W_skip": skip}), folder / "sae.safetensors")
    return peer_file(folder, lambda h: top(h.relu()), w, applied=not transcode, skip=skip)


def dictionary_learning(root: Path, dict_class: str, threshold: float = 0.4) -> PeerFile:
    w = weights(6)
    trainer = {
        "dict_class": dict_class,
        "activation_dim": D_IN,
        "dict_size": D_SAE,
        "k": K,
        "layer": 3,
        "lm_name": "a/pythia",
    }
    write_json(root / "config.json", {"trainer": trainer, "buffer": {"ctx_len": 128}})
    state: dict[str, Any] = linear(w)
    state |= {"k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(threshold)}
    bias = state.pop("decoder.bias")
    gate: Callable[[Tensor], Tensor] = torch.relu
    if dict_class in ("AutoEncoder", "AutoEncoderNew"):
        state = {name: state[name] for name in ("encoder.weight", "encoder.bias", "decoder.weight")}
        state["bias" if dict_class == "AutoEncoder" else "decoder.bias"] = bias
    elif dict_class in ("JumpReluAutoEncoder", "MatryoshkaBatchTopKSAE"):
        plain = {"W_enc": w.W_enc, "b_enc": w.b_enc, "W_dec": w.W_dec, "b_dec": w.b_dec}
        batch = {"k": state["k"], "threshold": state["threshold"], "group_sizes": torch.tensor([8, 12])}
        state = plain | ({"threshold": w.threshold} if dict_class == "JumpReluAutoEncoder" else batch)
        gate = jump(w.threshold.double()) if dict_class == "JumpReluAutoEncoder" else gate
    else:
        state["b_dec"] = bias
    if "BatchTopK" in dict_class:
        gate = lambda h: h.relu() * (h.relu() > torch.tensor(threshold))  # noqa: E731
    gate = (lambda h: top(h.relu())) if dict_class == "AutoEncoderTopK" else gate
    torch.save(state, root / "ae.pt")
    return peer_file(root, gate, w, applied=dict_class not in ("AutoEncoderNew", "JumpReluAutoEncoder"))


def llama_scope(root: Path, *, out_norm: float = IN_NORM, dtype: torch.dtype = torch.float32) -> PeerFile:
    """Its model sees x * c_in and predicts y * c_out; features and the one threshold are in units of x as it is."""
    w = Weights(*(tensor.to(dtype).float() for tensor in weights(7)))
    hooks = ["blocks.3.hook_resid_post", "blocks.3.hook_resid_post" if out_norm == IN_NORM else "blocks.3.hook_mlp_out"]
    config = {
        "d_model": D_IN,
        "d_sae": D_SAE,
        "hook_point_in": hooks[0],
        "hook_point_out": hooks[1],
        "act_fn": "jumprelu",
    }
    config |= {"norm_activation": "dataset-wise", "dataset_average_activation_norm": {"in": IN_NORM, "out": out_norm}}
    write_json(
        root / "hyperparams.json",
        {**config, "jump_relu_threshold": 0.5, "sparsity_include_decoder_norm": True, "top_k": 50},
    )
    (root / "checkpoints").mkdir()
    save_file(
        {name: tensor.to(dtype) for name, tensor in linear(w).items()}, root / "checkpoints" / "final.safetensors"
    )
    c_in, c_out = math.sqrt(D_IN) / IN_NORM, math.sqrt(D_IN) / out_norm
    W_enc, b_enc, W_dec, b_dec = (tensor.double() for tensor in w[:4])

    def encode(x: Tensor) -> Tensor:
        hidden_pre = (x * c_in @ W_enc + b_enc) / c_in
        return hidden_pre * (hidden_pre * W_dec.norm(dim=1) > 0.5)

    return PeerFile(root, encode, lambda x: (encode(x) * c_in @ W_dec + b_dec) / c_out)


def llamascopium(root: Path, act_fn: str = "jumprelu", *, older: bool = False) -> PeerFile:
    """Trained on x * c, with the norms in the weights' file; `older` are the names of the R1 release."""
    w = weights(8)
    hook = "blocks.3.hook_resid_post"
    config = {
        "sae_type": "sae",
        "d_model": D_IN,
        "expansion_factor": D_SAE / D_IN,
        "act_fn": act_fn,
        "top_k": K,
        "hook_point_in": hook,
    }
    config |= {"hook_point_out": hook, "norm_activation": "dataset-wise", "sparsity_include_decoder_norm": True}
    write_json(root / "config.json", {**config, "use_decoder_bias": True})
    names = {"W_E": w.W_enc, "b_E": w.b_enc, "W_D": w.W_dec, "b_D": w.b_dec}
    state = linear(w) if older else names
    log = "log_jumprelu_threshold" if older else "activation_function.log_jumprelu_threshold"
    state |= {log: w.threshold.log()} if act_fn == "jumprelu" else {}
    save_file(
        {**state, f"dataset_average_activation_norm.{hook}": torch.tensor(IN_NORM)}, root / "sae_weights.safetensors"
    )
    W_enc, b_enc, W_dec, b_dec, threshold = (tensor.double() for tensor in w)
    c, norms = math.sqrt(D_IN) / IN_NORM, W_dec.norm(dim=1)

    def encode(x: Tensor) -> Tensor:
        gated = (x * c @ W_enc + b_enc) * norms
        gated = top(gated) if act_fn == "topk" else gated * (gated > threshold)
        return gated / c if act_fn == "topk" else gated / norms / c  # a TopK that rescales says so, as in SAELens

    directions = W_dec / norms[:, None] if act_fn == "topk" else W_dec
    return PeerFile(root, encode, lambda x: (encode(x) * c @ directions + b_dec) / c)


def layer_normed(w: Weights) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    W_enc, b_enc, W_dec, b_dec = (tensor.double() for tensor in w[:4])

    def encode(x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        return top((x / (x.std(-1, keepdim=True) + 1e-5) - b_dec) @ W_enc + b_enc)

    def forward(x: Tensor) -> Tensor:
        return (encode(x) @ W_dec + b_dec) * x.std(-1, keepdim=True) + x.mean(-1, keepdim=True)

    return encode, forward


def openai(root: Path, activation: str = "ReLU") -> PeerFile:
    w = weights(9)
    state: dict[str, Any] = {
        "pre_bias": w.b_dec,
        "latent_bias": w.b_enc,
        "stats_last_nonzero": torch.zeros(D_SAE, dtype=torch.long),
        "latents_activation_frequency": torch.ones(D_SAE),
        "latents_mean_square": torch.zeros(D_SAE),
        "encoder.weight": w.W_enc.t().contiguous(),
        "decoder.weight": w.W_dec.t().contiguous(),
        "activation": activation,
        "activation_state_dict": {"k": K, "postact_fn": "ReLU"} if activation == "TopK" else {},
    }
    torch.save(state, root / "5.pt")
    if activation == "TopK":
        return PeerFile(root / "5.pt", *layer_normed(w))
    return peer_file(root / "5.pt", torch.relu, w, applied=True)


def goodfire(root: Path) -> PeerFile:
    w, path = weights(10), root / "Llama-3.1-8B-Instruct-SAE-l19.pth"
    torch.save(linear(w, "encoder_linear", "decoder_linear"), path)
    return peer_file(path, torch.relu, w, applied=False)


def deepseek_r1(root: Path) -> PeerFile:
    w, path = weights(11), root / "DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt"
    torch.save(linear(w), path)
    return peer_file(path, torch.relu, w, applied=False)


def qwen_scope(root: Path) -> PeerFile:
    w, folder = weights(12), root / f"SAE-Res-Qwen3-1.7B-Base-W32K-L0_{K}"
    folder.mkdir()
    state = {"W_enc": w.W_enc.t().contiguous(), "b_enc": w.b_enc, "W_dec": w.W_dec.t().contiguous(), "b_dec": w.b_dec}
    torch.save(state, folder / "layer9.sae.pt")
    torch.save(state, folder / "layer10.sae.pt")
    return peer_file(folder / "layer9.sae.pt", top, w, applied=False)


def hook_z(root: Path) -> PeerFile:
    w, path = weights(14), root / "gpt2-small_L3_Hcat_z.pt"
    write_json(
        root / "gpt2-small_L3_Hcat_z_cfg.json",
        {"act_size": D_IN, "dict_size": D_SAE, "act_name": "blocks.3.attn.hook_z"},
    )
    torch.save({"W_enc": w.W_enc, "b_enc": w.b_enc, "W_dec": w.W_dec, "b_dec": w.b_dec}, path)
    return peer_file(path, torch.relu, w, applied=True)


def circuit_tracer(root: Path, *, is_gated: bool = True) -> PeerFile:
    w, skip = weights(13), torch.randn(D_IN, D_IN, generator=torch.Generator().manual_seed(13))
    state = {"W_enc": w.W_enc.t().contiguous(), "b_enc": w.b_enc, "W_dec": w.W_dec, "b_dec": w.b_dec}
    state |= {"activation_function.threshold": w.threshold, "W_skip": skip} if is_gated else {}
    save_file(state, root / "layer_3.safetensors")
    gate = jump(w.threshold.double()) if is_gated else torch.relu
    return peer_file(root / "layer_3.safetensors", gate, w, applied=False, skip=skip if is_gated else None)


DICTIONARIES = (
    "AutoEncoder AutoEncoderNew AutoEncoderTopK BatchTopKSAE MatryoshkaBatchTopKSAE JumpReluAutoEncoder".split()
)
AUTOENCODERS: dict[str, Callable[[Path], PeerFile]] = {
    "saelens-jumprelu": saelens,
    "saelens-standard": lambda root: saelens(root, "standard"),
    "saelens-topk": lambda root: saelens(root, "topk"),
    "saelens-legacy": saelens_legacy,
    "gemma-scope": gemma_scope,
    "gemma-scope-embedding": gemma_scope_embedding,
    "gemma-scope-2": gemma_scope_2,
    "sparsify": sparsify,
    **{
        f"dictionary-learning-{name}": (lambda root, name=name: dictionary_learning(root, name))
        for name in DICTIONARIES
    },
    "dictionary-learning-unset": lambda root: dictionary_learning(root, "BatchTopKSAE", -1.0),
    "llama-scope": llama_scope,
    "llama-scope-bf16": lambda root: llama_scope(root, dtype=torch.bfloat16),
    "llamascopium": llamascopium,
    "llamascopium-topk": lambda root: llamascopium(root, "topk"),
    "llamascopium-r1": lambda root: llamascopium(root, older=True),
    "openai": openai,
    "goodfire": goodfire,
    "deepseek-r1": deepseek_r1,
    "qwen-scope": qwen_scope,
}
# what this library's modules do not run, and the formats carry
OTHERS: dict[str, Callable[[Path], PeerFile]] = {
    "gemma-scope-2-affine": gemma_scope_2_affine,
    "sparsify-transcoder": lambda root: sparsify(root, transcode=True),
    "llama-scope-transcoder": lambda root: llama_scope(root, out_norm=OUT_NORM),
    "hook-z": hook_z,
    "openai-topk": lambda root: openai(root, "TopK"),
    "circuit-tracer": circuit_tracer,
    "circuit-tracer-relu": lambda root: circuit_tracer(root, is_gated=False),
}
