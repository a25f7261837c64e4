"""One Hessian over several processes: the engine is torch.distributed."""
