"""The same computation has the same identity in every process, another one has another."""

import dataclasses
import functools
import os
import subprocess
import sys
from collections import UserDict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from spectra.objective.identity import architecture, digest, digest_of

ROOT = Path(__file__).parents[2]


def scaled(factor):
    return lambda x: factor * x


@dataclasses.dataclass
class Batch:
    inputs: torch.Tensor
    name: str = "a"


class Criterion:
    def __init__(self, weight):
        self.weight = weight
        self._cache = object()


ONES = torch.ones(3)
DIFFERENT = [
    (ONES, torch.ones(3, dtype=torch.float64)),
    (ONES, torch.ones(3, 1)),
    (ONES, torch.tensor([1.0, 1.0, np.nextafter(np.float32(1), np.float32(2))])),
    ([1, 2], [2, 1]),
    ([1, 2], (1, 2)),
    ({"a": 1}, {"b": 1}),
    (1, 1.0),
    ("1", 1),
    (scaled(1.0), scaled(2.0)),
    (functools.partial(max, 1), functools.partial(max, 2)),
    (functools.partial(max, 1), functools.partial(min, 1)),
    (lambda x: x + 1, lambda x: x - 1),
    (lambda x: x, lambda x, y=1: x),
    (Batch(ONES), Batch(2 * ONES)),
    (Batch(ONES), Batch(ONES, "b")),
    (Criterion(1.0), Criterion(2.0)),
    (nn.CrossEntropyLoss(), nn.CrossEntropyLoss(label_smoothing=0.1)),
    (nn.CrossEntropyLoss(weight=ONES), nn.CrossEntropyLoss(weight=2 * ONES)),
    (UserDict(a=ONES), UserDict(a=0 * ONES)),
    ({1, 2}, {1, 3}),
    (np.ones(3), np.ones(3, dtype=np.float32)),
    (np.float32(1), np.float64(1)),
    (None, 0),
]


@pytest.mark.parametrize(("one", "other"), DIFFERENT, ids=lambda value: type(value).__name__)
def test_different_values_have_different_digests(one, other):
    assert digest_of(one) != digest_of(other)


@pytest.mark.parametrize(
    "make",
    [
        lambda: scaled(3.0),
        lambda: Criterion(1.0),
        lambda: Batch(torch.ones(2)),
        lambda: nn.CrossEntropyLoss(weight=torch.ones(2)),
        lambda: {"x": [torch.ones(2), {"y": (1, None, slice(3), torch.float32)}]},
        lambda: np.array([scaled, None], dtype=object),
        lambda: {scaled, max},
    ],
)
def test_values_that_are_made_anew_have_the_same_digest(make):
    assert digest_of(make()) == digest_of(make())


def test_neither_memory_nor_device_shows_in_a_digest():
    whole = torch.arange(12.0).reshape(3, 4)
    assert digest(whole.T) == digest(whole.T.contiguous())
    assert digest(whole[:, 1]) == digest(whole[:, 1].clone())
    assert digest(whole.to_sparse()) != digest(whole + 1)


def test_what_refers_to_itself_has_a_digest():
    def again(x):
        return again(x - 1) if x else 0

    loop = [1]
    loop.append(loop)
    assert digest_of(again)
    assert digest_of(loop)


def test_digests_are_the_same_in_another_process():
    program = (
        "import torch; from tests.objective.test_identity import *;"
        "net = nn.Sequential(nn.Linear(2, 2)); net.extra_repr = lambda: repr(scaled);"
        "print(digest_of(scaled(2.0)), digest_of(Criterion(1.0)), digest_of({scaled}), "
        "architecture(net))"
    )
    said = {
        subprocess.run(
            [sys.executable, "-c", program],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": str(seed), "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in (1, 2)
    }
    assert len(said) == 1
    assert architecture(nn.Linear(2, 3)) != architecture(nn.Linear(2, 4))
