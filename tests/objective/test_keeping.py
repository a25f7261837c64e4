import pytest
import torch

from spectra.objective.keeping import Checksums, checksums

SIZES = [1, 5, 4096, 4097, 10_000]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.complex64, torch.int64, torch.bool]


def tensors(dtype):
    g = torch.Generator().manual_seed(0)
    return [torch.randint(0, 2, (n,), generator=g).to(dtype) for n in SIZES]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("which", range(len(SIZES)))
def test_a_change_of_any_entry_shows(dtype, which):
    kept, same = tensors(dtype), Checksums()
    before = checksums(kept)
    assert checksums(tensors(dtype)) == same.of(kept) == before
    for place in {0, SIZES[which] // 2, SIZES[which] - 1}:
        kept[which].data[place] = 1 - kept[which].data[place].real.int()
        assert checksums(kept) == same.of(kept) != before
        kept[which].data[place] = 1 - kept[which].data[place].real.int()
        assert checksums(kept) == same.of(kept) == before


def test_among_few_entries_a_change_shows_that_a_sum_would_swallow():
    kept = [torch.tensor([1e8, 1e-3])]
    before = checksums(kept)
    kept[0].data[1] = 2e-3
    assert checksums(kept) != before


@pytest.mark.parametrize("size", [6, 100])
def test_tensors_on_other_memory_or_in_another_order_are_looked_at_anew(size):
    tensor = torch.arange(float(size**2)).view(size, size)
    same = Checksums()
    before = same.of([tensor])
    own = tensor.data
    tensor.data = own.clone().mul_(2)
    assert same.of([tensor]) == checksums([tensor]) != before
    tensor.data = own
    assert same.of([tensor]) == before
    tensor.data = own.T
    assert same.of([tensor]) == checksums([tensor]) != before
    other = torch.ones(3)
    assert same.of([tensor, other]) == checksums([tensor, other])
    assert same.of([other]) == checksums([other])


def test_entries_that_change_places_show():
    a, b = torch.arange(6.0), torch.arange(10_000.0)
    before = checksums([a, b])
    assert checksums([a.flip(0), b]) != before
    assert checksums([a, b.flip(0)]) != before


def test_nothing_and_what_has_no_entries():
    assert checksums([]) == b""
    checksums([torch.zeros(0), torch.zeros(0, 3)])
    checksums([torch.eye(3).to_sparse()])
    checksums([torch.ones(3, 5, 4).transpose(0, 2), torch.tensor(2.0)])


def test_another_default_dtype_does_not_matter():
    before = torch.get_default_dtype()
    kept = tensors(torch.float32)
    expected = checksums(kept)
    torch.set_default_dtype(torch.float64)
    try:
        assert checksums(kept) == expected
    finally:
        torch.set_default_dtype(before)
