"""What does the Hessian of a language model with a billion parameters take on one GPU?

    python -m experiments.large_models.one_gpu          # on a GPU of 80 GB: within ten minutes
    python -m experiments.large_models.one_gpu --tiny   # a tiny one, on the CPU: in seconds

prints one table. The model is Llama's architecture with random weights, stored in bfloat16 and
computed in float32. Without a GPU it is the tiny one in any case.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import spectra
from spectra.objective.memory import in_words, peak_bytes

SECONDS = 540.0
# The gradient that is kept with its graph, two and a half vectors of work for a product, and the
# vectors of the test of symmetry, three beside the product; Lanczos takes fewer beside its basis.
VECTORS = 7
# Of Lanczos, most and fewest; more than the most would not be read off the table.
MOST_MATVECS, LEAST_MATVECS = 60, 8
EIGENVALUES = 3


@dataclass(frozen=True)
class Setting:
    """A Llama, its data, and how far its spectrum is looked into."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    inner: int
    vocabulary: int
    length: int
    sequences: int
    # The basis has one row more. On a host of 128 GiB, of which half is used, 13 rows of a billion
    # numbers fit: 54 GiB.
    ncv: int
    steps: int


LARGE = Setting(
    layers=22,
    width=2048,
    heads=32,
    kv_heads=8,
    inner=5632,
    vocabulary=32_000,
    length=2048,
    sequences=1,
    ncv=12,
    steps=10,
)
TINY = Setting(
    layers=2,
    width=16,
    heads=4,
    kv_heads=2,
    inner=32,
    vocabulary=32,
    length=16,
    sequences=2,
    ncv=30,
    steps=10,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what there is time for, and print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.large_models.one_gpu",
        description=__doc__.split("\n", maxsplit=1)[0],
    )
    parser.add_argument("--tiny", action="store_true", help="the tiny model, on the CPU")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"at most ({SECONDS:g})")
    options = parser.parse_args(arguments)
    tiny = options.tiny or not torch.cuda.is_available()
    setting, device = (TINY, "cpu") if tiny else (LARGE, "cuda")
    print(table(measured(setting, torch.device(device), options.seconds)))
    return 0


def llama(setting: Setting, device: torch.device) -> nn.Module:
    """Random weights in bfloat16; buffers keep their precision, as in a checkpoint."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        num_hidden_layers=setting.layers,
        hidden_size=setting.width,
        num_attention_heads=setting.heads,
        num_key_value_heads=setting.kv_heads,
        intermediate_size=setting.inner,
        vocab_size=setting.vocabulary,
        max_position_embeddings=setting.length,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    with device:
        model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    return model


def batch(setting: Setting, device: torch.device) -> dict[str, Tensor]:
    """Random tokens."""
    generator = torch.Generator().manual_seed(0)
    shape = (setting.sequences, setting.length)
    tokens = torch.randint(0, setting.vocabulary, shape, generator=generator)
    return {"input_ids": tokens.to(device)}


def measured(setting: Setting, device: torch.device, limit: float) -> dict[str, Any]:
    """Everything in the table, by name; a part that fails or has no time says so."""
    begun = time.perf_counter()

    def left() -> float:
        return limit - (time.perf_counter() - begun)

    model = llama(setting, device)
    H = spectra.HessianOperator(
        model, spectra.losses.causal_lm(), [batch(setting, device)], compute_dtype=torch.float32
    )
    found: dict[str, Any] = {"setting": setting, "device": name_of(device), "n": H.shape[0]}
    found |= {"stored": sum(p.nbytes for p in model.parameters()), "vector": H.space.vector_bytes}
    print(estimate(found), flush=True)
    found["built"] = time.perf_counter() - begun
    for part in (products, density, eigenpairs):
        try:
            for name, value in part(H, setting, found, left):
                found[name] = value
        # Unattended: what was found before is printed.
        except Exception as error:
            found[part.__name__] = f"{type(error).__name__}: {error}"
        print(f"{part.__name__}: {left():.0f} s are left", file=sys.stderr, flush=True)
    found["peak"] = peak_bytes(device)
    found["operator"] = H.describe()
    found["seconds"] = time.perf_counter() - begun
    return found


Found = Iterator[tuple[str, Any]]
Left = Callable[[], float]


def products(H: Any, setting: Setting, found: dict[str, Any], left: Left) -> Found:
    """Times of a gradient and of products, and how symmetric these are."""
    space = H.space
    # The first gradient settles how the memory is used.
    H.gradient()
    yield "gradient", seconds(space.device, H.gradient)[0]
    generator = torch.Generator(space.device).manual_seed(0)
    u, v = (torch.randn(space.n, generator=generator, device=space.device) for _ in range(2))
    first, Hu = seconds(space.device, lambda: H @ u)
    yield "first", first
    later, Hv = seconds(space.device, lambda: H @ v)
    defect = abs(space.inner(u, Hv) - space.inner(v, Hu))
    # For independent random vectors ⟨u, Hv⟩ itself is as small as a random sum: what it is
    # compared with does not depend on that.
    yield "defect", defect / (space.norm(u) * space.norm(Hv))
    del Hu, Hv
    times = [later, *(seconds(space.device, lambda: H @ u)[0] for _ in range(2))]
    yield "later", statistics.median(times)


def density(H: Any, setting: Setting, found: dict[str, Any], left: Left) -> Found:
    """The spectral density of one probe, and what a step took with its basis where it is."""
    steps = min(setting.steps, int(0.4 * left() / (2 * found["later"])))
    if steps < 2:
        yield "density", "left out: no time"
        return
    taken, result = seconds(
        H.space.device, lambda: spectra.spectral_density(H, steps=steps, probes=1, progress=False)
    )
    yield "density", result
    yield "step", taken / steps


def eigenpairs(H: Any, setting: Setting, found: dict[str, Any], left: Left) -> Found:
    """The largest eigenvalues, in as many products as there is time for."""
    # On the average a step reads a larger basis than the density's did.
    step = 1.5 * found.get("step", 2 * found["later"])
    matvecs = min(MOST_MATVECS, int(0.8 * left() / step))
    if matvecs < LEAST_MATVECS:
        yield "eigenpairs", "left out: no time"
        return
    yield (
        "eigenpairs",
        spectra.eigsh(
            H,
            k=EIGENVALUES,
            which="LA",
            ncv=setting.ncv,
            max_matvecs=matvecs,
            progress=False,
        ),
    )


def seconds(device: torch.device, work: Callable[[], Any]) -> tuple[float, Any]:
    """Of one call, and what it returns."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, result


def name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def estimate(found: dict[str, Any]) -> str:
    """What is going to be held, before anything is computed."""
    setting, vector = found["setting"], found["vector"]
    tokens = setting.sequences * setting.length
    # Four float32 tensors per block: its input, the gradient by it, and what a product adds.
    inputs = 4 * 4 * setting.layers * tokens * setting.width
    # Float32 copies of what is outside of the blocks: the embedding and the head.
    copies = 2 * 4 * setting.vocabulary * setting.width
    rows = max(setting.ncv, setting.steps) + 1
    return (
        f"{found['n']:,} parameters, {in_words(found['stored'])}; a vector takes "
        f"{in_words(vector)}. Expected: on the device {VECTORS} vectors, {in_words(inputs)} for "
        f"the blocks and {in_words(copies)} for copies of embedding and head, together "
        f"{in_words(found['stored'] + VECTORS * vector + inputs + copies)} and the work on one "
        f"block; for the basis, {rows} vectors, {in_words(rows * vector)}, there or on the host."
    )


def table(found: dict[str, Any]) -> str:
    """All of it, in Markdown."""
    setting, operator = found["setting"], found.get("operator", {})
    rows = [
        ("device", found["device"]),
        (
            "model",
            f"Llama, {setting.layers} layers, width {setting.width}, T = {setting.length}, "
            f"{setting.sequences} sequence(s)",
        ),
        ("parameters", f"{found['n']:,}, {in_words(found['stored'])}"),
        ("dtype", f"stored in bfloat16, computed in {operator.get('compute_dtype')}"),
        *product_rows(found),
        ("peak memory", in_words(found["peak"])),
        ("graphs", f"{operator['graph']}, {operator.get('graphs', 'none built')}"),
        ("recomputed", str(operator.get("recompute", "nothing"))),
        *(
            (name, str(operator[name].replace("_", " ")))
            for name in ("attention", "loss_head")
            if name in operator
        ),
        *density_rows(found["density"]),
        *eigenvalue_rows(found["eigenpairs"]),
        ("time in all", f"{found['seconds']:.0f} s, of which {found['built']:.0f} for the model"),
    ]
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {text} |" for name, text in rows)])


def product_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    if "later" not in found:
        return [("products", found["products"])]
    unit = found["gradient"]
    return [
        ("gradient", f"{unit:.3g} s"),
        ("first product", f"{found['first']:.3g} s, {found['first'] / unit:.2f} gradients"),
        ("later product", f"{found['later']:.3g} s, {found['later'] / unit:.2f} gradients"),
        ("symmetry defect", f"{found['defect']:.1e} ‖u‖ ‖Hv‖"),
    ]


def density_rows(result: Any) -> list[tuple[str, str]]:
    if isinstance(result, str):
        return [("density", result)]
    trace, square = (float(result.moment_samples(power).mean()) for power in (1, 2))
    low, high = result.nodes.min(), result.nodes.max()
    return [
        ("density", f"{result.probes} probe, {result.steps} steps, nodes {low:.4g} to {high:.4g}"),
        ("by the density", f"trace {trace:.4g}, Frobenius norm {square**0.5:.4g}"),
        ("basis of the density", held(result)),
    ]


def eigenvalue_rows(result: Any) -> list[tuple[str, str]]:
    if isinstance(result, str):
        return [("eigenvalues", result)]
    pairs = zip(result.values, result.residuals, strict=True)
    rows = [(f"eigenvalue {i}", f"{x:.6g} ± {r:.1e}") for i, (x, r) in enumerate(pairs, start=1)]
    done = f"{int(result.converged.sum())} converged in {result.matvecs} products"
    return [*rows, ("search", done), ("basis of the search", held(result))]


def held(result: Any) -> str:
    """Where a basis was."""
    basis = result.provenance["basis"]
    return f"{basis['vectors']} vectors, {in_words(basis['bytes'])}, {basis['place']}"


if __name__ == "__main__":
    sys.exit(main())
