"""How many queries of an attention are computed at a time?"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["chunk_sizes"]

# Of the scores of one chunk, of which a dozen copies exist in its double backward. On the CPU it is
# as fast as one piece; on a GPU its kernels would be shorter than it takes to launch them.
_BYTES = 16 << 20
_BYTES_ON_A_GPU = 128 << 20
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
    allowed = _BYTES if query.device.type == "cpu" else _BYTES_ON_A_GPU
    size = max(_FEWEST_QUERIES, allowed // max(1, heads * keys * itemsize))
    if queries <= size:
        return [queries]
    whole, rest = divmod(queries, size)
    return [size] * whole + [rest] * (rest > 0)
