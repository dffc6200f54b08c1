"""Where features fire most: the top dialogues of every feature, found while streaming, and the text around the peak."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastsae.data.activations import ResidualStream
from fastsae.data.progress import bar
from fastsae.data.sinks import SinkRule
from fastsae.sae import SparseAutoencoder
from fastsae_kernels import SparseActs

WINDOW = 12  # tokens shown on either side of the peak
GROUP_TOKENS = 1024  # run through the model together: short passes, between which an interrupt is heard


class TopDialogues:
    """For each feature the dialogues with its largest activations, one entry per dialogue, attention sinks left out.

    Attributes:
        values: `[d_sae, n]` fp32, largest activation in the dialogue, descending; 0 where there is no further dialogue.
        dialogues: `[d_sae, n]` int64, number of the dialogue in the order of `add`.
        tokens: Token ids of each dialogue, int32.
        ids: Index of each dialogue in its dataset.
    """

    def __init__(self, d_sae: int, n: int = 5, device: torch.device | str = "cpu") -> None:
        self.values = torch.zeros(d_sae, n, device=device)
        self.dialogues = torch.zeros(d_sae, n, dtype=torch.int64, device=device)
        self.tokens: list[Tensor] = []
        self.ids: list[int] = []

    def add(
        self, acts: SparseActs, sinks: Tensor, rows: Tensor, token_rows: Sequence[Tensor], ids: Sequence[int]
    ) -> None:
        """Adds whole dialogues.

        Args:
            acts: `[N, d_sae]` features of their tokens, packed.
            sinks: `[N]` True for attention sinks.
            rows: `[N]` dialogue of each token, an index into `token_rows`.
            token_rows: Token ids of each dialogue, without padding.
            ids: Index of each dialogue in its dataset.
        """
        n_rows, d_sae = len(token_rows), acts.shape[1]
        tokens = acts.row_ids()
        counts = ~sinks[tokens]
        slots = rows[tokens[counts]] * d_sae + acts.indices[counts].long()
        largest = torch.zeros(n_rows * d_sae, device=acts.device)
        largest.scatter_reduce_(0, slots, acts.values[counts].float(), "amax")
        numbers = torch.arange(len(self.tokens), len(self.tokens) + n_rows, device=acts.device)
        values = torch.cat([self.values, largest.view(n_rows, d_sae).t()], dim=1)
        dialogues = torch.cat([self.dialogues, numbers.expand(d_sae, -1)], dim=1)
        self.values, chosen = values.topk(self.values.shape[1], dim=1)
        self.dialogues = dialogues.gather(1, chosen)
        self.tokens += [row.to("cpu", torch.int32) for row in token_rows]
        self.ids += ids


@torch.no_grad()
def top_contexts(
    sae: SparseAutoencoder,
    residual: ResidualStream,
    is_sink: SinkRule,
    tokenizer: Any,
    top: TopDialogues,
    features: Sequence[int],
    progress: bool = False,
) -> list[list[dict[str, Any]]]:
    """For each of the features its top contexts, by running the model once more on just their dialogues.

    A context is the tokens around the largest activation, at most `WINDOW` on either side: `{"dialogue": its index in the
    dataset, "position": of the peak, "peak": index of the peak in the window, "max_activation", "tokens": [str],
    "activations": [float]}`. Attention sinks are no peaks, and their activations read 0.
    """
    wanted = [(top.dialogues[f], top.values[f] > 0) for f in features]
    dialogues_of = [dialogues[fires].tolist() for dialogues, fires in wanted]
    numbers = sorted({n for dialogues in dialogues_of for n in dialogues}, key=lambda n: len(top.tokens[n]))
    activations = _activations(sae, residual, is_sink, [top.tokens[n] for n in numbers], features, progress)
    of_dialogue = dict(zip(numbers, activations, strict=True))
    return [
        [_context(tokenizer, top.ids[n], top.tokens[n], of_dialogue[n][:, i]) for n in dialogues]
        for i, dialogues in enumerate(dialogues_of)
    ]


def _activations(
    sae: SparseAutoencoder,
    residual: ResidualStream,
    is_sink: SinkRule,
    rows: list[Tensor],
    features: Sequence[int],
    progress: bool,
) -> list[Tensor]:
    """Activations `[T, n_features]` of the features in each row of token ids, 0 at sinks; rows come in ascending length."""
    columns = torch.full((sae.d_sae,), -1, dtype=torch.int64, device=sae.device)
    columns[torch.tensor(list(features), dtype=torch.int64, device=sae.device)] = torch.arange(
        len(features), device=sae.device
    )
    found: list[Tensor] = []
    with bar("reading contexts", "dialogue", total=len(rows), progress=progress) as advance:
        while len(found) < len(rows):
            group = rows[len(found) :]
            group = [row for i, row in enumerate(group) if i == 0 or (i + 1) * len(row) <= GROUP_TOKENS]
            lengths = [len(row) for row in group]
            input_ids = torch.nn.utils.rnn.pad_sequence([row.long() for row in group], batch_first=True)
            mask = torch.arange(input_ids.shape[1]) < torch.tensor(lengths)[:, None]
            x = residual(input_ids, mask)
            x = x[mask.to(x.device)].to(sae.device)
            sinks = is_sink(x, mask.nonzero(as_tuple=True)[1].to(sae.device))
            acts = sae.encode_sparse(x).packed()
            column, tokens = columns[acts.indices.long()], acts.row_ids()
            chosen = (column >= 0) & ~sinks[tokens]
            dense = torch.zeros(acts.shape[0], len(features), device=sae.device)
            dense[tokens[chosen], column[chosen]] = acts.values[chosen].float()
            found += dense.cpu().split(lengths)
            advance(len(group))
    return found


def _context(tokenizer: Any, dialogue_id: int, token_ids: Tensor, activations: Tensor) -> dict[str, Any]:
    peak = int(activations.argmax())
    start, end = max(0, peak - WINDOW), peak + WINDOW + 1
    return {
        "dialogue": dialogue_id,
        "position": peak,
        "peak": peak - start,
        "max_activation": float(activations[peak]),
        "tokens": [tokenizer.decode([token]) for token in token_ids[start:end].tolist()],
        "activations": activations[start:end].tolist(),
    }
