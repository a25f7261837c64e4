"""How many queries of an attention are computed at a time?"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["chunk_sizes"]

# Of the scores of one chunk, of which a dozen copies exist in its double backward. On the CPU chunks
# of this size are as fast as one piece; on a GPU small ones would be shorter than their launch.
_BYTES = {"cpu": 16 << 20, "cuda": 128 << 20}
# Below this the products of matrices are no longer the bulk of the work.
_FEWEST_QUERIES = 16


def chunk_sizes(query: Tensor, key: Tensor) -> list[int]:
    """Sizes of the chunks of queries; a single one where the scores are few.

    Parameters
    ----------
    query, key
        (..., number of them, features).
    """
    queries, keys = query.shape[-2], key.shape[-2]
    # Half precision is computed in float32.
    itemsize = max(query.element_size(), torch.float32.itemsize)
    heads = max(query.shape[:-2].numel(), key.shape[:-2].numel())
    bytes_per_query = max(1, heads * keys * itemsize)
    size = max(_FEWEST_QUERIES, _BYTES.get(query.device.type, _BYTES["cuda"]) // bytes_per_query)
    if queries <= size:
        return [queries]
    whole, rest = divmod(queries, size)
    return [size] * whole + [rest] * (rest > 0)
