"""Texts side by side in a batch's rows, so that the encoder computes nothing for padding.

Short texts differ in length by a factor: a batch padded to its longest is half padding (TREC's questions, 13 tokens
each on average, 24 in the longest of 32). Texts packed into common rows see themselves alone (a block-diagonal mask,
positions that start again), so what the model computes for each is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Where positions of a text start, by the type of encoder: only those with learned absolute positions can be packed
# this way (no relative positions, no sliding windows). RoBERTa's family counts from behind the padding token's index.
FIRST_POSITION = {"bert": 0, "distilbert": 0, "electra": 0}
BEHIND_PADDING = ("roberta", "xlm-roberta", "camembert")


@dataclass(frozen=True)
class Packed:
    """Texts in rows.

    Attributes:
        input_ids: (rows, length) int64, ``pad`` where there is no text.
        texts: (rows, length) int64: the number of the text, from 1 in the order given; 0 at padding.
        position_ids: (rows, length) int64, from 0 in each text.
    """

    input_ids: np.ndarray
    texts: np.ndarray
    position_ids: np.ndarray


def first_position(config: Any) -> int | None:
    """The position of a text's first token for that encoder; None where it does not allow packing."""
    if config.model_type in BEHIND_PADDING:
        return int(config.pad_token_id) + 1
    return FIRST_POSITION.get(config.model_type)


def pack(tokens: Sequence[np.ndarray], pad: int, room: int) -> Packed:
    """Fill rows with texts in their order; a row holds ``room`` tokens, or the longest text. 0 is one text a row."""
    longest = max(map(len, tokens))
    length = max(longest, room)
    row, free, rows = -1, 0, []
    for ids in tokens:
        if len(ids) > free or not room:
            row, free = row + 1, length
        rows.append((row, length - free))
        free -= len(ids)
    packed = Packed(
        np.full((row + 1, length), pad, dtype=np.int64),
        np.zeros((row + 1, length), dtype=np.int64),
        np.zeros((row + 1, length), dtype=np.int64),
    )
    for number, (ids, (row, start)) in enumerate(zip(tokens, rows, strict=True), start=1):
        here = slice(start, start + len(ids))
        packed.input_ids[row, here] = ids
        packed.texts[row, here] = number
        packed.position_ids[row, here] = np.arange(len(ids))
    used = int(packed.texts.any(0).sum())  # a batch of few texts leaves the end of every row empty
    return Packed(packed.input_ids[:, :used], packed.texts[:, :used], packed.position_ids[:, :used])


def block_mask(texts: Tensor, dtype: torch.dtype) -> Tensor:
    """(rows, 1, length, length): 0 where two tokens are of one text, else the most negative number of that dtype."""
    apart = texts.unsqueeze(1) != texts.unsqueeze(2)
    return torch.zeros(apart.shape, dtype=dtype, device=texts.device).masked_fill_(apart, torch.finfo(dtype).min)[
        :, None
    ]


def text_means(hidden: Tensor, texts: Tensor, count: int) -> Tensor:
    """(count, n) float32: the mean over each text's tokens of ``hidden`` (rows, length, n)."""
    there = texts.flatten().nonzero().squeeze(1)
    numbers = texts.flatten()[there] - 1
    sums = hidden.new_zeros(count, hidden.shape[-1], dtype=torch.float32)
    sums = sums.index_add(0, numbers, hidden.flatten(0, 1)[there].float())
    return sums / torch.bincount(numbers, minlength=count).unsqueeze(1)
