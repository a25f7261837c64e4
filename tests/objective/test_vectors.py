import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

from spectra.errors import StorageError
from spectra.objective import places, vectors
from spectra.objective.vectors import VectorSpace

LONG = 5_000_000
linux = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="other systems do not tell it in /proc"
)


@pytest.fixture(scope="module")
def long():
    """Two float32 vectors of five million entries, and the same in float64."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, LONG, generator=generator)
    return x, x + 0.5 * y


def test_norms_of_long_float32_vectors_are_accumulated_in_float64(long):
    x, _ = long
    exact = float(torch.linalg.vector_norm(x.double()))
    assert VectorSpace(LONG, torch.float32).norm(x) == pytest.approx(exact, rel=1e-12)


def test_inner_products_of_long_float32_vectors_keep_float32_accuracy(long):
    x, y = long
    exact = float(torch.dot(x.double(), y.double()))
    assert VectorSpace(LONG, torch.float32).inner(x, y) == pytest.approx(exact, rel=2e-7)


def test_projections_of_long_float32_vectors_keep_float32_accuracy(long):
    basis = torch.stack(long)
    space = VectorSpace(LONG, torch.float32)
    products = space.project(basis, long[0])
    assert products.dtype == torch.float64
    eps = torch.finfo(torch.float32).eps
    torch.testing.assert_close(products, basis.double() @ long[0].double(), rtol=4 * eps, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, 100, (1 << 14) + 1, 50_000])
def test_basis_operations_are_those_of_the_matrix(dtype, n, generator):
    space = VectorSpace(n, dtype)
    basis = torch.randn(4, n, generator=generator).to(dtype)
    x = torch.randn(n, generator=generator).to(dtype)
    coefficients = torch.randn(4, generator=generator, dtype=torch.float64)
    rows, vector, c = basis.double().numpy(), x.double().clone().numpy(), coefficients.numpy()
    tolerance = {"rtol": 100 * space.eps, "atol": 100 * space.eps * np.sqrt(n)}

    np.testing.assert_allclose(space.project(basis, x).numpy(), rows @ vector, **tolerance)
    np.testing.assert_allclose(space.combine(basis, coefficients).numpy(), c @ rows, **tolerance)
    assert space.combine(basis, coefficients).dtype == dtype
    several = torch.stack([x, -2 * x, basis[0]])
    each = np.stack([vector, -2 * vector, rows[0]])
    expected = each @ rows.T
    np.testing.assert_allclose(space.projections(basis, several).numpy(), expected, **tolerance)
    space.subtract_each(several, basis, torch.stack([coefficients, -coefficients, coefficients]))
    np.testing.assert_allclose(several.numpy(), each - np.stack([c, -c, c]) @ rows, **tolerance)
    space.subtract(x, basis, coefficients)
    np.testing.assert_allclose(x.numpy(), vector - c @ rows, **tolerance)


# The last basis does not fit into one tile.
@pytest.mark.parametrize(("m", "n"), [(1, 1), (5, 1000), (300, 40_001)])
def test_rotate_replaces_the_first_rows_by_their_rotation(m, n, generator):
    basis = torch.randn(m, n, generator=generator, dtype=torch.float64)
    rotation = torch.randn(m, (m + 1) // 2, generator=generator, dtype=torch.float64)
    expected = rotation.T @ basis
    untouched = basis[len(expected) :].clone()
    VectorSpace(n).rotate(basis, rotation)
    torch.testing.assert_close(basis[: len(expected)], expected)
    assert torch.equal(basis[len(expected) :], untouched)


def spiked(count, generator):
    """A vector and rows of which so many entries in every block outweigh all others."""
    x, rows = 1e-3 * torch.randn(1 << 18, generator=generator), torch.randn(3, 1 << 18).abs_()
    for start in range(0, len(x), vectors._BLOCK):
        x[start : start + 50 * count : 50] = 1.0
    return x, rows.mul_(1e-3).add_(x > 0.5)


def heavy_tailed(generator):
    """A vector without a variance, and rows that are multiples of it."""
    x = torch.randn(1 << 18, generator=generator) / torch.rand(1 << 18, generator=generator).sqrt()
    return x, x * torch.tensor([[1.0], [-0.3], [7.0]])


@pytest.mark.parametrize("spikes", [0, 1, 3, 16, 60, 110, 200, 1000])
def test_entries_that_stand_out_swallow_no_others(spikes, generator):
    x, rows = spiked(spikes, generator) if spikes else heavy_tailed(generator)
    space = VectorSpace(len(x), torch.float32)

    def error(found, rows, x):
        exact = rows.double() @ x.double()
        sizes = rows.double().norm(dim=1) * x.double().norm()
        return float(((found - exact).abs() / sizes).max())

    beside, bound = torch.randn(len(x), generator=generator), 4 * space.eps
    if not spikes:
        # Some processors' kernels add all the terms of a block one by one, whatever their sizes.
        along = beside * torch.tensor([[1.0], [-0.3], [7.0]])
        bound = max(bound, 2 * error(space.project(along, beside), along, beside))
    assert error(space.project(rows, x), rows, x) < bound
    # Beside a vector without such entries, which is left alone.
    both = torch.stack([beside, x])
    assert error(space.projections(rows, both)[1], rows, x) < bound
    assert torch.equal(both, torch.stack([beside, x]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("share", [0.0, 0.1, 1e8])
def test_what_is_removed_is_told_and_nothing_of_it_is_left(share, dtype, generator):
    space = VectorSpace(5000, dtype)
    exact = torch.linalg.qr(torch.randn(5000, 5, dtype=torch.float64, generator=generator))[0].T
    rows = exact.contiguous().to(dtype)
    rest = torch.randn(5000, dtype=torch.float64, generator=generator)
    rest -= exact.T @ (exact @ rest)
    x = (rest + share * exact.sum(dim=0)).to(dtype)
    before, parts = float(x.double().norm()), rows.double() @ x.double()
    removed = space.remove(x, rows)
    assert removed.before == pytest.approx(before, rel=10 * space.eps)
    assert np.allclose(removed.parts, parts, rtol=0, atol=10 * space.eps * before)
    assert removed.left == pytest.approx(float(x.double().norm()), rel=1e-12)
    assert float((rows.double() @ x.double()).abs().max()) < 10 * space.eps * removed.left


def test_vectors_have_the_dtype_of_the_space():
    space = VectorSpace(3, torch.float32)
    assert space.zeros().shape == (3,)
    assert space.zeros(2).tolist() == [[0.0] * 3] * 2
    assert space.empty(2).shape == (2, 3)
    assert {space.zeros().dtype, space.empty(1).dtype} == {torch.float32}
    assert space.eps == np.finfo(np.float32).eps
    assert VectorSpace(3).eps == np.finfo(np.float64).eps


def test_half_of_the_free_memory_is_affordable():
    small, large = VectorSpace(1000, torch.float32), VectorSpace(2000, torch.float64)
    assert small.affordable() > 0
    # Memory comes and goes between the two calls.
    assert small.affordable() == pytest.approx(4 * large.affordable(), rel=0.2)
    assert VectorSpace(1 << 60, torch.float64).affordable() == 0


# --- a basis elsewhere ------------------------------------------------------------------------


@pytest.fixture(params=["device", "disk", "copied"])
def elsewhere(request, monkeypatch):
    """Where a basis is held: beside the vectors, on disk, or where each block has to be copied."""
    if request.param == "copied":
        # As for an accelerator whose basis is in the host's memory.
        monkeypatch.setattr(vectors, "_elsewhere", lambda rows, device: rows.dim() > 1)
        return "host"
    return request.param


@pytest.fixture
def directory(monkeypatch):
    """Where the files of bases are made."""
    # Not pytest's own, which may be in memory.
    with tempfile.TemporaryDirectory() as directory:
        monkeypatch.setattr(tempfile, "tempdir", directory)
        yield Path(directory)


def filled(space, place, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    basis = space.basis(count, place)
    for row in basis:
        row.copy_(torch.randn(space.n, generator=generator).to(space.dtype))
        # Entries that stand out are taken apart, and must be so everywhere.
        row[:3] = torch.tensor([1e3, -2e3, 5e2])
    return basis


# A whole number of blocks, less than one, and what aligns with nothing.
@pytest.mark.parametrize("n", [1000, 1 << 17, 200_003])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_basis_elsewhere_gives_the_same_numbers(elsewhere, n, dtype):
    space = VectorSpace(n, dtype)
    here, there = space.empty(7), filled(space, elsewhere, 7)
    here.copy_(there)
    assert space.place_of(there) == elsewhere
    x = torch.randn(n, generator=torch.Generator().manual_seed(1)).to(dtype)
    coefficients = torch.linspace(-1, 2, 7, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(7, 4, dtype=torch.float64))[0]

    def answers(basis):
        rest = x.clone()
        space.subtract(rest, basis, coefficients)
        found = [space.project(basis, x), space.combine(basis, coefficients), rest]
        found.append(space.gram(basis))
        space.rotate(basis, rotation)
        return [*found, basis.clone(), space.reordered(basis, torch.tensor([2, 0, 1]))]

    elsewhere_found = answers(there)
    with pytest.MonkeyPatch.context() as plain:
        plain.setattr(vectors, "_elsewhere", lambda rows, device: False)
        found = answers(here)
    if elsewhere != "host":
        assert all(map(torch.equal, found, elsewhere_found))
        return
    # The rows of a copied block lie closer together, and some processors' kernels add the terms of
    # rows that start at other addresses in another order.
    scales = [space.norm(x) * float(torch.linalg.vector_norm(here, dim=1).max())]
    scales += [float(other.abs().max()) for other in found[1:]]
    for one, other, scale in zip(elsewhere_found, found, scales, strict=True):
        assert float((one - other).abs().max()) <= 4 * space.eps * scale


@linux
def test_the_file_of_a_basis_goes_with_its_last_view(directory):
    free, before = shutil.disk_usage(directory).free, mapped_files()
    space = VectorSpace(2_000_000, torch.float64)
    row = space.basis(10, "disk")[3]
    # The blocks are taken before anything is written, and no name is left that could stay behind.
    assert shutil.disk_usage(directory).free < free - 80e6
    assert list(directory.iterdir()) == []
    assert space.place_of(row) == "disk"
    assert mapped_files() == before + 1
    del row
    assert mapped_files() == before
    # Other processes write to the same disk.
    assert shutil.disk_usage(directory).free > free - 80e6


@linux
def test_nothing_is_left_of_a_basis_after_an_exception(directory):
    before = mapped_files()

    def fail():
        space = VectorSpace(100_000)
        space.project(space.basis(3, "disk"), space.zeros(2))

    with pytest.raises(RuntimeError):
        fail()
    assert list(directory.iterdir()) == []
    assert mapped_files() == before


def mapped_files():
    """Mapped files without a name, as this process sees them."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return sum("spectra-" in line and "(deleted)" in line for line in lines)


def test_a_basis_that_the_disk_cannot_hold_is_refused_before_it_is_written(directory):
    with pytest.raises(StorageError, match=r"3 vectors takes .* GiB on disk, .* GiB free; set TMP"):
        VectorSpace(1 << 50).basis(3, "disk")
    assert list(directory.iterdir()) == []


@linux
def test_a_file_beyond_the_processs_limit_is_refused_before_it_is_written(directory):
    # A write to a mapped page without a block would end the process instead.
    code = f"""
import resource, tempfile
tempfile.tempdir = {str(directory)!r}
from spectra.objective.vectors import VectorSpace
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
try:
    VectorSpace(1 << 20).basis(3, "disk")
except OSError as error:
    print(type(error).__name__, error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert done.stdout.startswith("StorageError a basis of 3 vectors takes 0.0234 GiB on disk")
    assert list(directory.iterdir()) == []


def test_a_directory_in_memory_is_no_disk(monkeypatch):
    memory = Path("/dev/shm")
    if not memory.is_dir():
        pytest.skip("this system shows no file system in memory")
    monkeypatch.setattr(tempfile, "tempdir", str(memory))
    with pytest.raises(StorageError, match=r"in memory \(tmpfs\); set TMPDIR"):
        VectorSpace(10).basis(3, "disk")
    assert VectorSpace(10).affordable("disk") == 0


def test_a_basis_is_held_where_it_fits(monkeypatch):
    space = VectorSpace(1000, torch.float32)

    def free(memory, disk, host=None):
        def vectors_of(device):
            return 2 * 4000 * (memory if host is None or device.type != "cpu" else host)

        monkeypatch.setattr(vectors, "free_bytes", vectors_of)
        monkeypatch.setattr(places, "free_disk_bytes", lambda: 2 * 4000 * disk)

    free(memory=100, disk=1000)
    assert space.place(97) == ("device", 97)
    assert space.place(98) == ("disk", 98)
    assert space.place(98, 50) == ("device", 97)
    assert space.place(98, 50, spare=60) == ("disk", 98)
    assert space.place(40, 20, room=30) == ("device", 27)
    assert space.place(40, 30, room=30) == ("disk", 40)
    free(memory=100, disk=150)
    assert space.place(400, 120) == ("disk", 150)
    # Without a disk, what there is; or more than half of the memory, where it has to be.
    free(memory=100, disk=0)
    assert space.place(150) == ("device", 97)
    assert space.place_for(150) == "device"
    assert space.place_for(250) == "disk"
    assert space.place(40, 30, room=20) == ("device", 17)
    # An accelerator: its host comes before a smaller basis.
    space.device = torch.device("cuda")
    free(memory=100, disk=1000, host=200)
    assert space.place(97) == ("device", 97)
    assert space.place(98, 50) == ("host", 98)
    assert space.place(201, 50) == ("device", 97)
    assert space.place(201, 98) == ("disk", 201)


def test_rows_are_taken_over_without_a_copy_where_they_are_a_basis(generator):
    space = VectorSpace(70_000, torch.float32)
    rows = torch.randn(3, 70_000, generator=generator)
    assert space.held(rows).data_ptr() == rows.data_ptr()
    mapped = filled(space, "disk", 3)
    assert space.place_of(space.held(mapped.T.T)) == "disk"
    for other in (rows.double(), rows.T.contiguous().T):
        basis = space.held(other)
        assert torch.equal(basis, rows)
        assert basis.is_contiguous()


def test_the_rows_that_are_kept_of_a_basis_survive_a_full_disk(monkeypatch):
    space = VectorSpace(300_000)
    basis = filled(space, "disk", 6)
    expected = basis[[1, 0]].clone()
    assert torch.equal(space.reordered(basis, torch.tensor([1, 0])), expected)
    # Where the disk has filled up in the meantime, in place: a long search is not lost.
    basis = filled(space, "disk", 6)
    monkeypatch.setattr(places, "_check_room", no_room)
    kept = space.reordered(basis, torch.tensor([1, 0]))
    assert torch.equal(kept, expected)
    assert kept.data_ptr() == basis.data_ptr()


def no_room(directory, size):
    raise OSError(28, "No space left on device")
