"""The top dialogues of every feature while streaming, and the window around a peak."""

import torch

from fastsae.evaluate.contexts import WINDOW, TopDialogues, _context
from fastsae_kernels import SparseActs


def sparse(dense: torch.Tensor) -> SparseActs:
    rows, indices = dense.nonzero(as_tuple=True)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), (dense != 0).sum(1).cumsum(0)])
    return SparseActs(offsets, indices.int(), dense[rows, indices], tuple(dense.shape))


def test_streaming_keeps_the_largest_activation_of_each_dialogue():
    generator = torch.Generator().manual_seed(0)
    acts = torch.rand(9, 5, 6, generator=generator)  # 9 dialogues of 5 tokens, 6 features
    acts = acts * (torch.rand(9, 5, 6, generator=generator) < 0.2)
    acts[:, 0] = 100  # position 0 never counts
    acts[3, 2] = 100  # nor does another attention sink
    sinks = torch.zeros(9, 5, dtype=torch.bool)
    sinks[:, 0] = sinks[3, 2] = True
    acts[:, 1:, 5] = torch.where(sinks[:, 1:], 100, 0.0)  # this feature fires nowhere else
    top = TopDialogues(6, n=3)
    for start, end in ((0, 4), (4, 5), (5, 9)):
        part = acts[start:end]
        n = end - start
        rows = torch.arange(n).repeat_interleave(5)
        ids = list(range(100 + start, 100 + end))
        top.add(sparse(part.flatten(0, 1)), sinks[start:end].flatten(), rows, [torch.arange(5)] * n, ids)
    largest = acts.masked_fill(sinks[..., None], 0).amax(1)  # [9, 6]
    expected, dialogues = largest.t().topk(3, dim=1)
    assert torch.equal(top.values, expected)
    fires = expected > 0
    assert torch.equal(top.dialogues[fires], dialogues[fires])
    assert not top.values[5].any()
    assert top.ids == list(range(100, 109))
    assert len(top.tokens) == 9


def test_the_window_surrounds_the_peak(tokenizer):
    tokens, activations = torch.arange(60), torch.zeros(60)
    activations[30], activations[33] = 2.0, 1.0
    context = _context(tokenizer, 8, tokens, activations)
    assert (context["dialogue"], context["position"], context["peak"]) == (8, 30, WINDOW)
    assert context["max_activation"] == 2
    assert context["tokens"] == [f"t{i} " for i in range(30 - WINDOW, 31 + WINDOW)]
    assert context["activations"] == activations[30 - WINDOW : 31 + WINDOW].tolist()


def test_the_window_ends_with_the_dialogue(tokenizer):
    activations = torch.tensor([0.0, 0.5, 1.0])
    context = _context(tokenizer, 0, torch.arange(3), activations)
    assert (context["position"], context["peak"], len(context["tokens"])) == (2, 2, 3)
