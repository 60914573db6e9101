"""Which pairs of a batch belong together, when several do: one picture, caption or label.

A row's groups are its ids, say of its picture, of its caption and of its label; rows that agree in
any of them are positives of one another (UniCL, arXiv:2204.03610, equation 2; ALBEF's retrieval
targets). This is no equivalence: of three rows the first two may share a picture, the last two a
caption.

Legend: N global batch, E embedding, G groups, R rows, C columns.
"""

from itertools import combinations

import torch
from torch import Tensor


def find_positives(rows: Tensor, columns: Tensor) -> Tensor:
    """(R, C) bool: whether a row and a column agree in any group. rows (R, G), columns (C, G)."""
    found = torch.zeros(len(rows), len(columns), dtype=torch.bool, device=rows.device)
    for row, column in zip(rows.T, columns.T, strict=True):
        found |= row[:, None] == column
    return found


def average_positives(features: Tensor, groups: Tensor) -> Tensor:
    """The mean of the features of each row's positives, its own included, without an (N, N) mask.

    features (N, E), groups (N, G); returns (N, E). Rows that agree in all of some groups are sums
    of segments; those that agree in any follow by inclusion and exclusion over the 2^G - 1 choices
    of groups, in O(N E) memory.
    """
    counted = torch.cat([features, features.new_ones(len(features), 1)], dim=1)  # (N, E + 1)
    total = torch.zeros_like(counted)
    for size in range(1, groups.shape[1] + 1):
        for chosen in combinations(range(groups.shape[1]), size):
            _, segment = torch.unique(groups[:, chosen], dim=0, return_inverse=True)
            sums = torch.zeros_like(counted).index_add(0, segment, counted)
            total = total + (-1) ** (size + 1) * sums[segment]
    return total[:, :-1] / total[:, -1:]
