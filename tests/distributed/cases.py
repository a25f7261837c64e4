"""What each of several processes computes in the tests: `python -m tests.distributed.cases`.

    CASE SIZE FOLDER

The processes find one another through a file in FOLDER, and leave there what they found.
"""

from __future__ import annotations

import datetime
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import spectra
from spectra.distributed import shard
from tests.cases.checkpoints import SIZES
from tests.cases.networks import TinyGPT, tanh_mlp

__all__ = ["PROBLEMS", "problem", "run", "shares"]

CASES: dict[str, Callable[[int, int], Any]] = {}
# How long one rank waits for another.
TIMEOUT = datetime.timedelta(seconds=40)


# --- problems ------------------------------------------------------------------------------------


def mlp(dtype: torch.dtype) -> tuple[nn.Module, Any, list[Any]]:
    """Batches of different sizes."""
    generator = torch.Generator().manual_seed(1)
    data = [
        (
            torch.randn(size, 6, generator=generator, dtype=torch.float64).to(dtype),
            torch.randint(3, (size,), generator=generator),
        )
        for size in (4, 9, 1, 6, 5, 2)
    ]
    return tanh_mlp(dtype=dtype), spectra.losses.supervised(nn.CrossEntropyLoss()), data


def sequences(vocabulary: int) -> list[dict[str, Tensor]]:
    """Token batches with padding: their weights are not their sizes."""
    generator = torch.Generator().manual_seed(2)
    batches = []
    for count, lengths in ((2, (7, 3)), (3, (5, 5, 2)), (1, (4,)), (2, (6, 6))):
        ids = torch.randint(1, vocabulary, (count, 7), generator=generator)
        mask = torch.stack([(torch.arange(7) < n).long() for n in lengths])
        batches.append({"input_ids": ids * mask, "attention_mask": mask})
    return batches


def gpt(dtype: torch.dtype) -> tuple[nn.Module, Any, list[Any]]:
    """Head and embedding are one parameter."""
    return TinyGPT().to(dtype), spectra.losses.causal_lm(), sequences(7)


def llama(dtype: torch.dtype) -> tuple[nn.Module, Any, list[Any]]:
    """A language model of transformers'."""
    import transformers

    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).to(dtype)
    return model, spectra.losses.causal_lm(), sequences(SIZES["vocab_size"])


PROBLEMS = {"mlp": mlp, "gpt": gpt, "llama": llama}


def problem(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Any, list[Any]]:
    """A model with the same weights in every process, a loss, and all of the data."""
    torch.manual_seed(0)
    model, loss, data = PROBLEMS[name](dtype)
    return model.eval(), loss, data


def shares(data: list[Any], size: int) -> list[list[Any]]:
    """Unequal ones; the second of three or more ranks has none."""
    if size == 2:
        return [data[:1], data[1:]]
    with_data = [rank for rank in range(size) if rank != 1]
    owner = [with_data[i % len(with_data)] for i in range(len(data))]
    return [[b for b, own in zip(data, owner, strict=True) if own == rank] for rank in range(size)]


def spread(name: str, rank: int, size: int, dtype: torch.dtype = torch.float64) -> Any:
    """The operator of one rank."""
    model, loss, data = problem(name, dtype)
    return spectra.HessianOperator(model, loss, shares(data, size)[rank], process_group=True)


def sharded(
    name: str,
    rank: int,
    size: int,
    dtype: torch.dtype = torch.float64,
    *,
    batches: int | None = None,
    **options: Any,
) -> Any:
    """The operator of one rank, which has a part of the parameters and of the data."""
    model, loss, data = problem(name, dtype)
    mine = shares(data[:batches], size)[rank]
    return spectra.HessianOperator(shard(model), loss, mine, **options)


def directions(n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Two vectors, the same everywhere."""
    generator = torch.Generator().manual_seed(5)
    return torch.randn(n, 2, generator=generator, dtype=torch.float64).to(dtype)


# --- cases ---------------------------------------------------------------------------------------


def case(function: Callable[[int, int], Any]) -> Callable[[int, int], Any]:
    """By its name on the command line."""
    CASES[function.__name__] = function
    return function


@case
def products(rank: int, size: int) -> Any:
    """Of every problem in both precisions, with value, gradient, and what it cost to agree."""
    found = {}
    for name in PROBLEMS:
        for dtype in (torch.float64, torch.float32):
            H = spread(name, rank, size, dtype)
            V = directions(H.space.n, dtype)
            answer = {"products": H.apply(V), "value": H.value(), "gradient": H.gradient()}
            before = H.collective_calls()
            H.apply(V[:, 0].contiguous())
            calls = [b - a for a, b in zip(before, H.collective_calls(), strict=True)]
            found[f"{name} {dtype}"] = {**answer, "calls": calls, "n": H.space.n}
    return found


@case
def sharded_products(rank: int, size: int) -> Any:
    """Of every problem in both precisions, with value, gradient, and what it cost."""
    found = {}
    for name in PROBLEMS:
        for dtype, graph in (
            (torch.float64, "fresh"),
            (torch.float64, "retained"),
            (torch.float32, "retained"),
        ):
            H = sharded(name, rank, size, dtype, graph=graph)
            space = H.space
            v = directions(space.n, dtype)[:, 0].contiguous()
            found[f"{name} {dtype} {graph}"] = {
                "product": space.whole(H.apply(space.own(v))),
                "value": H.value(),
                "gradient": space.whole(H.gradient()),
                "again": H @ v.numpy(),
                "length": space.length,
            }
    return found


def fsdp(model: nn.Module, mesh: Any) -> nn.Module:
    """PyTorch's own sharding, layer by layer."""
    for module in model.children():
        if next(module.parameters(), None) is not None:
            fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def across(model: nn.Module, mesh: Any) -> nn.Module:
    """Tensor parallelism of a perceptron: its weights are cut in columns and rows."""
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    return parallelize_module(model, mesh, plan)


@case
def kinds(rank: int, size: int) -> Any:
    """Products with models that were spread over the processes in every way."""
    line = init_device_mesh("cpu", (size,))
    grid = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("replicate", "shard"))
    found = {}
    for name, spread_over in {
        "in shards": lambda model: shard(model, line),
        "copies of shards": lambda model: shard(model, grid),
        "under FSDP": lambda model: fsdp(model, line),
        "under FSDP, copies of shards": lambda model: fsdp(model, grid),
        "tensor parallel": lambda model: across(model, line),
    }.items():
        model, loss, data = problem("mlp")
        model = spread_over(model)
        mine = shares(data[:2], size)[rank]
        if name == "under FSDP":
            # What the caller's own pass has put together.
            model(data[0][0])
        for kind in (spectra.HessianOperator, spectra.GaussNewtonOperator):
            H = kind(model, loss, mine)
            space = H.space
            V = space.own(directions(space.n).T).T.contiguous()
            found[f"{name}, {kind.__name__}"] = space.whole(H.apply(V).T).T
        found[f"{name}, block"] = (H.block("2.*") @ directions(24).numpy())[:, 0]
        found[f"{name}, trace"] = spectra.trace(H, max_matvecs=6, progress=False).value
        if "FSDP" in name:
            # The model runs by itself as before.
            found[f"{name}, loss"] = float(_whole(model(data[0][0]).sum()))
    model, loss, data = problem("mlp", torch.float32)
    H = spectra.HessianOperator(
        shard(model.bfloat16()), loss, shares(data[:2], size)[rank], compute_dtype=torch.float32
    )
    found["stored in half precision"] = H @ directions(H.space.n).numpy()
    with pytest.raises(spectra.errors.ArgumentError, match="compiles products on one process"):
        spectra.HessianOperator(model, loss, shares(data, size)[rank], compile=True)
    return found


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@case
def answers(rank: int, size: int) -> Any:
    """Every question of the MLP."""
    return asked(spread("mlp", rank, size))


@case
def sharded_results(rank: int, size: int) -> Any:
    """Eigenvectors in shards, gathered, and on the disk."""
    folder = Path(sys.argv[3])
    H = sharded("mlp", rank, size, batches=2, recompute="none")
    pairs = spectra.eigsh(H, 2, tol=1e-8, progress=False)
    with pytest.raises(spectra.errors.StorageError) as refused:
        pairs.save(folder / f"refused {rank}")
    whole = H.collected(pairs)
    if whole is not None:
        whole.save(folder / "whole")
    H.space.save_vectors(pairs.vectors, folder / "vectors")
    dist.barrier()
    model, loss, data = problem("mlp")
    turned = spectra.HessianOperator(
        shard(model, init_device_mesh("cpu", (size, 1))), loss, data[:2]
    )
    again = H.space.load_vectors(folder / "vectors")
    return {
        "text": str(pairs),
        "refused": str(refused.value),
        "here": whole is not None,
        "again": bool(torch.equal(again, pairs.vectors)),
        "in other shards": turned.space.whole(turned.space.load_vectors(folder / "vectors").T),
        "by module": H.space.unflatten(pairs.vectors[:, 0].contiguous(), "2.*"),
    }


@case
def monitored(rank: int, size: int) -> Any:
    """A training under FSDP whose curvature is measured on the data of all ranks."""
    model, loss, data = problem("mlp")
    model = fsdp(model, init_device_mesh("cpu", (size,)))
    return trained(model, loss, data[0], shares(data[:2], size)[rank])


def trained(model: nn.Module, loss: Any, batch: Any, data: list[Any]) -> Any:
    """Eigenvalues and losses at every second of some steps on one batch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    monitor = spectra.CurvatureMonitor(model, loss, data, optimizer, every=2, k=2, tol=1e-6)
    for step in range(5):
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()
        monitor.step(step)
    return [
        (m.step, m.error, m.loss, m.alignment, m.threshold, *m.eigenvalues)
        for m in monitor.trajectory.measurements
    ]


@case
def sharded_answers(rank: int, size: int) -> Any:
    """Every question of the MLP in shards."""
    # Of few batches, and with all parameters gathered together: it makes no odds to the questions.
    return asked(sharded("mlp", rank, size, batches=2, recompute="none"))


def asked(H: Any) -> dict[str, Any]:
    """What an operator answers, as numbers."""
    ask = {"progress": False, "seed": 3}
    pairs = spectra.eigsh(H, 4, which="BE", tol=1e-8, **ask)
    trace = spectra.trace(H, rtol=0.1, deflate=pairs, **ask)
    density = spectra.spectral_density(H, steps=12, probes=3, **ask)
    analysis = spectra.analyze(H, 3, steps=10, rtol=0.2, preflight="strict", **ask)
    blocks = spectra.block_spectra(H, k=1, **ask)
    coupling = spectra.block_coupling(H, **ask)
    diagonal = spectra.diagonal(H, rtol=0.3, **ask)
    solution = spectra.solve(H, H.gradient(), damping=10.0, progress=False)
    whole = H.space.whole
    found = {
        "eigenvalues": pairs.values,
        "eigenvectors": np.abs(whole(pairs.vectors.T).T.numpy()),
        "diagonal": whole(diagonal.values).numpy(),
        "diagonal by layer": diagonal.parameter_traces,
        "solution": whole(solution.x).numpy(),
        "in blocks": spectra.eigsh(H, 4, tol=1e-8, block_size=3, **ask).values,
        "norm": np.array([spectra.norm(H, **ask).value]),
        "by layer": analysis.blocks.parameter_traces,
        "masses": analysis.blocks.masses,
        "trace": np.array([trace.value, trace.standard_error]),
        "nodes of the density": density.nodes,
        "analysis": np.array([analysis.trace.value, analysis.frobenius_norm.value]),
        "values of blocks": np.stack([b.values for b in blocks.eigenpairs.values()]),
        "coupling": coupling.samples,
        "matvecs": np.array([pairs.matvecs, trace.matvecs, density.matvecs]),
    }
    if not H.space.spread:
        weights, forms = H.quadratic_forms(directions(H.space.n))
        order = np.argsort(weights)
        found |= {"weights": weights[order], "forms": forms[order]}
    return found


@case
def probe_groups(rank: int, size: int) -> Any:
    """Different probes on processes that have all of the data, or together have."""
    model, loss, data = problem("mlp")
    if size == 4:
        # All have to make all groups.
        pairs = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])]
        across = [dist.new_group(ranks) for ranks in ([0, 2], [1, 3])]
        mine = data[rank % 2 :: 2]
        H = spectra.HessianOperator(
            model, loss, mine, process_group=pairs[rank // 2], probe_group=across[rank % 2]
        )
    else:
        H = spectra.HessianOperator(model, loss, data, probe_group=True)
    found = estimated(H)
    found["own"] = H.matvecs
    with pytest.raises(spectra.errors.ArgumentError, match="records one course"):
        spectra.trace(H, checkpoint=Path(sys.argv[3]) / "run", progress=False)
    last = rank == size - 1
    with pytest.raises(spectra.SpectraError) as caught:
        spectra.trace(H, seed=3 + last, progress=False)
    found["another seed"] = str(caught.value)
    compute = H._products

    def failing(rows: Tensor) -> Tensor:
        if last:
            msg = "no more"
            raise spectra.errors.LossError(msg)
        return compute(rows)

    if size != 4:
        H._products_into = lambda rows, out: out.copy_(failing(rows))
        with pytest.raises(spectra.SpectraError) as caught:
            spectra.spectral_density(H, steps=4, probes=3, progress=False)
        found["failed"] = f"{type(caught.value).__name__}: {caught.value}"
    return found


def estimated(H: Any) -> dict[str, Any]:
    """Of probes: their samples, and what they cost."""
    ask = {"progress": False, "seed": 3}
    trace = spectra.trace(H, rtol=0.2, method="hutchinson", max_matvecs=13, **ask)
    frobenius = spectra.norm(H, "fro", rtol=0.5, max_matvecs=60, **ask)
    density = spectra.spectral_density(H, steps=6, probes=5, **ask)
    auto = spectra.trace(H, rtol=0.1, max_matvecs=40, **ask)
    return {
        "auto": np.array([auto.value, *auto.interval(0.999)]),
        "trace": trace.samples,
        "trace, matvecs": trace.matvecs,
        "converged": trace.converged,
        "norm": frobenius.samples,
        "nodes": density.nodes,
        "weights": density.weights,
        "density, matvecs": density.matvecs,
        "groups": density.provenance["operator"].get("probe_groups", 1),
    }


@case
def wrapped(rank: int, size: int) -> Any:
    """DistributedDataParallel comes off, and is refused where the processes are not together."""
    model, loss, data = problem("mlp")
    parallel = nn.parallel.DistributedDataParallel(model)
    mine = shares(data, size)[rank]
    H = spectra.HessianOperator(parallel, loss, mine, process_group=dist.group.WORLD)
    try:
        spectra.HessianOperator(parallel, loss, mine)
        refused = ""
    except spectra.errors.DoubleBackwardError as error:
        refused = str(error)
    return {
        "products": H.apply(directions(H.space.n)),
        "notes": H.describe()["notes"],
        "block notes": H.block("0.*").describe()["notes"],
        "refused": refused,
    }


def failing(rank: int, size: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Calls that one rank does otherwise than the others, each after the one before has ended."""
    last = size - 1
    model, loss, data = problem("mlp")
    mine = shares(data, size)[rank]

    def operator(**options: Any) -> Any:
        return spectra.HessianOperator(model, loss, mine, process_group=True, **options)

    def raising(model: nn.Module, batch: Any) -> Tensor:
        if rank == last:
            msg = "out of luck"
            raise ValueError(msg)
        return loss(model, batch)

    H = operator()
    v = directions(H.space.n)[:, 0].contiguous()
    raising.reduction = "mean"
    bad = spectra.HessianOperator(model, raising, mine, process_group=True)
    yield "an exception", lambda: bad.apply(v)
    yield "other options", lambda: spectra.eigsh(H, 2 + (rank == last), progress=False)
    yield "another seed", lambda: spectra.trace(H, seed=rank, progress=False)
    yield "another question", lambda: H.gradient() if rank == last else H.apply(v)
    yield "another vector", lambda: H.apply(v * (1 + (rank == last)))
    other = spectra.HessianOperator(
        model, loss, mine, "0.*" if rank == last else None, process_group=True
    )
    yield "other parameters", other.value
    yield (
        "no parameters",
        lambda: spectra.HessianOperator(
            model, loss, mine, "none.*" if rank == last else None, process_group=True
        ),
    )
    # No data on any rank.
    empty = spectra.HessianOperator(model, loss, [], process_group=True)
    yield "no data at all", lambda: empty.apply(v)
    with torch.no_grad():
        model[0].bias += rank == last
    yield "other weights", lambda: H.apply(v)


@case
def failures(rank: int, size: int) -> Any:
    """What every rank says of each, and that they can go on together afterwards."""
    found = {}
    for name, call in failing(rank, size):
        with pytest.raises(spectra.SpectraError) as caught:
            call()
        found[name] = f"{type(caught.value).__name__}: {caught.value}"
    # Still in step.
    H = spread("mlp", rank, size)
    return {**found, "then": H.value()}


def failing_in_shards(rank: int, size: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    """As `failing`, where a rank that fails is in the middle of a pass that all are in."""
    last = size - 1
    model, loss, data = problem("mlp")
    mine, calls = shares(data, size)[rank], 0

    def raising(model: nn.Module, batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if rank == last and calls == 2:
            msg = "out of luck"
            raise ValueError(msg)
        return loss(model, batch)

    raising.reduction = "mean"
    model = shard(model)
    yield "an exception", spectra.HessianOperator(model, raising, mine).gradient
    H = spectra.HessianOperator(model, loss, mine)
    v = H.space.own(directions(H.space.n)[:, 0].contiguous())

    class Cube(torch.autograd.Function):
        """Fails where it is differentiated, deep inside of autograd."""

        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x**3

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            if rank == last:
                msg = "no derivative today"
                raise RuntimeError(msg)
            return grad

    cube = spectra.HessianOperator(model, lambda m, b: Cube.apply(loss(m, b)), mine)
    yield "in a derivative", lambda: cube.apply(v)
    bad = [(x * math.nan if rank == last else x, y) for x, y in mine]
    yield "a loss of nan", lambda: spectra.HessianOperator(model, loss, bad).apply(v)
    yield "other options", lambda: spectra.eigsh(H, 2 + (rank == last), progress=False)
    yield "another seed", lambda: spectra.trace(H, seed=rank, progress=False)
    yield "another question", lambda: H.gradient() if rank == last else H.apply(v)
    yield "a whole vector", lambda: H.apply(directions(H.space.n))
    yield "a vector of a wrong length", lambda: H.apply(torch.cat([v, v]) if rank == last else v)

    def decayed(model: nn.Module, batch: Any) -> Tensor:
        return loss(model, batch) + 0.1 * sum(p.pow(2).sum() for p in model.parameters())

    yield "weight decay", lambda: spectra.HessianOperator(model, decayed, mine).apply(v)

    def total(model: nn.Module, batch: Any) -> Tensor:
        return loss(model, batch) + torch.cat([p.flatten() for p in model.parameters()]).norm()

    yield "weights in one vector", lambda: spectra.HessianOperator(model, total, mine).apply(v)
    # The norms of the parts of batches are not those of the batches.
    yield "parts of the data", lambda: H.quadratic_forms(v)
    other = problem("mlp")[0]
    with torch.no_grad():
        other[0].bias += rank == last
    yield "other weights", lambda: shard(other)
    copies = shard(problem("mlp")[0], init_device_mesh("cpu", (size, 1)))
    copies[0].bias.to_local().detach().add_(rank == last)
    yield "other copies", lambda: spectra.HessianOperator(copies, loss, mine)
    yield "not all", lambda: spectra.HessianOperator(model, loss, mine, process_group=False)


@case
def sharded_failures(rank: int, size: int) -> Any:
    """What every rank says of each, and that they can go on together afterwards."""
    found = {}
    for name, call in failing_in_shards(rank, size):
        with pytest.raises(spectra.SpectraError) as caught:
            call()
        found[name] = f"{type(caught.value).__name__}: {caught.value}"
    model, loss, data = problem("mlp")

    def decayed(model: nn.Module, batch: Any) -> Tensor:
        return loss(model, batch) + 0.1 * sum(p.pow(2).sum() for p in model.parameters())

    decayed.reduction = "mean"
    H = spectra.HessianOperator(
        shard(model), decayed, shares(data, size)[rank], recompute="none", microbatch=2
    )
    found["decayed"] = H @ directions(74).numpy()
    model = problem("mlp")[0]
    alone = spectra.HessianOperator(model, loss, data)
    found["note"] = " ".join(alone.describe().get("notes", ()))
    return {**found, "then": sharded("mlp", rank, size).value()}


@case
def killed(rank: int, size: int) -> Any:
    """One process is gone in the middle of a question."""
    return ended_by_a_kill(spread("mlp", rank, size), rank)


@case
def killed_in_shards(rank: int, size: int) -> Any:
    """The same, where all of them are in the middle of a pass."""
    return ended_by_a_kill(sharded("mlp", rank, size), rank)


def ended_by_a_kill(H: Any, rank: int) -> dict[str, Any]:
    """What the others say, and after how long."""
    compute = H._products
    count = 0

    def counted(rows: Tensor) -> Tensor:
        nonlocal count
        count += 1
        if rank == 1 and count == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return compute(rows)

    H._products_into = lambda rows, out: out.copy_(counted(rows))
    began = time.monotonic()
    try:
        spectra.eigsh(H, 3, progress=False)
    except spectra.errors.DistributedError as error:
        return {"said": str(error), "seconds": time.monotonic() - began}
    return {"said": "nothing", "seconds": 0.0}


def resumed(H: Any, path: Path, *, after: int | None = None, how: str = "") -> dict[str, Any]:
    """An analysis with a checkpoint, perhaps ended by the last rank in one of its passes."""
    compute, count = H._oracle._multiplied, 0

    def counted(vectors: Tensor, out: Tensor | None) -> Any:
        nonlocal count
        count += 1
        if count == after and dist.get_rank() == dist.get_world_size() - 1:
            if how == "signal":
                os.kill(os.getpid(), signal.SIGTERM)
            else:
                msg = "enough"
                raise spectra.errors.LossError(msg)
        return compute(vectors, out)

    H._oracle._multiplied = counted
    found = spectra.analyze(
        H, 3, steps=8, rtol=0.2, ncv=12, budget=80, checkpoint=path, progress=False
    )
    return {
        "numbers": np.array([*found.eigenpairs.values, found.trace.value if found.trace else 0.0]),
        "products": count,
        "partial": found.partial,
        "notes": " ".join(found.notes),
    }


@case
def checkpoints(rank: int, size: int) -> Any:
    """A run that is ended in two ways and goes on, and what is refused."""
    folder = Path(sys.argv[3])
    found: dict[str, Any] = {"whole": resumed(spread("mlp", rank, size), folder / "whole")}
    with pytest.raises(spectra.SpectraError, match="enough"):
        resumed(spread("mlp", rank, size), folder / "run", after=30)
    dist.barrier()
    if rank == 0:
        shutil.copy(folder / "run", folder / "recorded")
    found["stopped"] = resumed(spread("mlp", rank, size), folder / "run", after=20, how="signal")
    found["again"] = resumed(spread("mlp", rank, size), folder / "run")
    model, loss, data = problem("mlp")
    other = spectra.HessianOperator(model, loss, shares(data[1:], size)[rank], process_group=True)
    with pytest.raises(spectra.SpectraError, match="6 batches before, 5 now") as caught:
        resumed(other, folder / "recorded")
    return {**found, "refused": type(caught.value).__name__}


@case
def sharded_checkpoints(rank: int, size: int) -> Any:
    """A run in shards that is ended in two ways and goes on."""
    folder = Path(sys.argv[3])

    def operator() -> Any:
        return sharded("mlp", rank, size, batches=3, recompute="none")

    found: dict[str, Any] = {"whole": resumed(operator(), folder / "whole")}
    with pytest.raises(spectra.SpectraError, match="enough"):
        resumed(operator(), folder / "run", after=30)
    dist.barrier()
    if rank == 0:
        shutil.copy(folder / "run", folder / "recorded")
    found["stopped"] = resumed(operator(), folder / "run", after=20, how="signal")
    return {**found, "again": resumed(operator(), folder / "run")}


@case
def going_on_in_shards(rank: int, size: int) -> Any:
    """The same run on another number of ranks."""
    H = sharded("mlp", rank, size, batches=3, recompute="none")
    return resumed(H, Path(sys.argv[3]) / "recorded")


@case
def going_on(rank: int, size: int) -> Any:
    """The same run on another number of ranks."""
    return resumed(spread("mlp", rank, size), Path(sys.argv[3]) / "recorded")


# --- running them --------------------------------------------------------------------------------


def run(name: str, size: int, folder: Path, *, lost: tuple[int, ...] = ()) -> list[Any]:
    """What each of `size` processes returned; None for those that are to be lost."""
    folder.mkdir(parents=True, exist_ok=True)
    process = subprocess.Popen(
        [sys.executable, "-m", __name__, name, str(size), str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        start_new_session=True,
    )
    try:
        said = process.communicate(timeout=200)[0]
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == len(lost), said
    return [
        None if rank in lost else torch.load(folder / f"{rank}.pt", weights_only=False)
        for rank in range(size)
    ]


def main() -> int:
    """Start one process for each rank, and return how many of them failed.

    They are forked: to import PyTorch in each of them takes longer than what they compute.
    """
    name, size, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    if name in {"products", "sharded_products"}:
        # Whatever these import, once.
        for other in PROBLEMS:
            problem(other)
    ranks = []
    for rank in range(size):
        if (started := os.fork()) == 0:
            status = 1
            try:
                compute(name, rank, size, folder)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        ranks.append(started)
    return sum(os.waitpid(rank, 0)[1] != 0 for rank in ranks)


def compute(name: str, rank: int, size: int, folder: Path) -> None:
    """One of the processes."""
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=size, timeout=TIMEOUT
    )
    torch.save(CASES[name](rank, size), folder / f"{rank}.pt")
    if not name.startswith("killed"):
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
