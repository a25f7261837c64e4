"""One Hessian over several processes: the engine is torch.distributed."""

from spectra.distributed.sharding import shard

__all__ = ["shard"]
