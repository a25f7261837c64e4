"""The blocks of the page on several processes run, here with a single one."""

import re
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import spectra

PAGE = Path(__file__).parent.parent.parent / "docs" / "distributed.md"
BLOCKS = re.findall(r"```python notest\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch.distributed is not there")


class Network(nn.Module):
    """With as many layers as the page speaks of."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(4))

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def test_every_block_runs(tmp_path, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    end = dist.destroy_process_group
    # The blocks after the first one need the processes, too.
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    torch.manual_seed(0)
    namespace = {
        "model": Network(),
        "loss": spectra.losses.supervised(nn.CrossEntropyLoss()),
        "batches": [(torch.randn(6, 2), torch.randint(2, (6,))) for _ in range(2)],
    }
    try:
        for number, block in enumerate(BLOCKS):
            exec(compile(block, f"{PAGE.name}, block {number}", "exec"), namespace)
    finally:
        end()
    assert len(BLOCKS) == 3
    # What the blocks say that they leave.
    assert namespace["H"].describe()["probe_groups"] == 1
    assert len(spectra.load("pairs")) == 10
    assert list(Path("eigenvectors").glob("*.safetensors"))
