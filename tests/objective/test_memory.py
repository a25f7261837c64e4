import subprocess
import sys
import weakref

import pytest
import torch

from spectra.objective.memory import SavedBytes, free_bytes, held_bytes, peak_bytes

CPU = torch.device("cpu")
MIB = 2**20
linux = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="other systems do not tell it in /proc"
)


@linux
def test_what_is_allocated_is_held_and_no_longer_free():
    held, free = held_bytes(CPU), free_bytes(CPU)
    tensor = torch.ones(100 * MIB // 4)
    assert held_bytes(CPU) - held == pytest.approx(100 * MIB, rel=0.1)
    # Other processes allocate and free at the same time.
    assert free_bytes(CPU) < free + 1024 * MIB
    del tensor
    assert held_bytes(CPU) - held < 20 * MIB
    assert peak_bytes(CPU) >= held + 90 * MIB


@linux
def test_the_peak_is_not_that_of_the_process_that_started_this_one():
    tensor = torch.ones(600 * MIB // 4)
    code = (
        "import torch; from spectra.objective.memory import *; cpu = torch.device('cpu');"
        "print(peak_bytes(cpu) - held_bytes(cpu))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert int(done.stdout) < 200 * MIB
    del tensor


def test_a_containers_limit_counts(tmp_path, monkeypatch):
    (tmp_path / "memory.max").write_text(f"{300 * MIB}\n")
    (tmp_path / "memory.current").write_text(f"{100 * MIB}\n")
    monkeypatch.setattr("spectra.objective.memory._CGROUP", tmp_path)
    assert free_bytes(CPU) == 200 * MIB
    # A file that was read, or a basis that is mapped from one, gives way to what needs memory.
    (tmp_path / "memory.stat").write_text(
        f"anon {MIB}\ninactive_file {20 * MIB}\nactive_file {30 * MIB}\n"
    )
    assert free_bytes(CPU) == 250 * MIB
    (tmp_path / "memory.max").write_text("max\n")
    assert free_bytes(CPU) > 200 * MIB


def test_what_a_forward_pass_saves_is_counted_once_and_let_go():
    x = torch.ones(1000, requires_grad=True)
    weight = torch.ones(1000)
    counted = SavedBytes([x, weight])
    with counted.counting():
        y = (weight * x).exp()
        z = y * y
    # The exponential saves its result, the product saves it again; the rest was there before.
    assert counted.total == 4000
    gone = weakref.ref(y)
    del y, z
    assert gone() is None
