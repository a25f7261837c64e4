"""Damaged files are refused, or load as what was saved; nothing else is ever raised."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from experiments.reliability.fuzz_loaders import ALLOWED, TARGETS, Case, run
from experiments.reliability.mutations import MUTATIONS


@pytest.fixture(scope="module", params=TARGETS, ids=lambda target: target.name)
def case(request, tmp_path_factory):
    return Case(request.param, tmp_path_factory.mktemp("fuzz"))


@given(seed=st.integers(0, 2**63))
@hypothesis_settings(max_examples=150)
def test_mutated_files_are_refused_or_load_as_they_were(case, seed):
    verdict, mutations = case.verdict(seed)
    assert verdict in ALLOWED, mutations


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
def test_every_mutation_changes_something(mutation, tmp_path):
    case = Case(TARGETS[0], tmp_path)
    changed = [mutation(case.files, case.other, random.Random(seed)) for seed in range(20)]
    assert any(files != case.files for files in changed)


def test_bits_of_every_byte_are_watched(tmp_path):
    """Not sampled: the first and last bit of each byte of a whole result, one after the other."""
    case = Case(TARGETS[1], tmp_path)
    for name, content in case.files.items():
        for place in range(len(content)):
            for bit in (1, 128):
                flipped = bytearray(content)
                flipped[place] ^= bit
                assert case.judged({**case.files, name: bytes(flipped)}) in {"refused", "the same"}


def test_a_checkpoint_cut_off_anywhere_is_refused_or_gone_on_from(tmp_path):
    target = next(target for target in TARGETS if target.name == "checkpoint")
    case = Case(target, tmp_path)
    verdicts = set()
    for files in (case.files, case.other):
        ((name, content),) = files.items()
        # Where the vectors of a restart are gone, and right behind them.
        for end in range(0, len(content), 499):
            verdicts.add(case.judged({name: content[:end]}))
    assert verdicts == {"refused", "the same"}


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_thousands_of_mutated_files_neither_kill_nor_stop_a_process(target):
    found = run(target, 4000)
    assert found["failures"] == []
    assert sum(found["verdicts"].values()) == 4000
    assert found["memory_growth_mib"] < 500
