"""What every test shares: one thread, seeded generators, repeatable hypothesis."""

import os
import random
import signal
import tempfile

# On some processors MKL adds in an order that depends on addresses, unless it is told not to.
# Before torch: it is read once. Programs that are started inherit it.
os.environ.setdefault("MKL_CBWR", "AUTO")

import numpy as np
import pytest
import torch
from hypothesis import settings

from spectra.objective import places

# pytest-xdist runs one worker per core, and PyTorch would start as many threads in each of them.
torch.set_num_threads(1)

# In the background of a shell Ctrl-C is ignored: a test that sends it to itself would wait forever.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def _seeded():
    """Initial weights do not depend on which tests ran before."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - the global state is what is seeded
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _temporary_files_on_disk():
    """Where /tmp is in memory, a basis on disk would be refused."""
    if places.free_disk_bytes():
        yield
        return
    with tempfile.TemporaryDirectory(dir=".") as directory, pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", directory)
        yield


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(1)
