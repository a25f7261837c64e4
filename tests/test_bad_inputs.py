"""Every bad input is refused in clear words or answered rightly, and changes nothing."""

import pytest
import torch

from tests.cases.bad_inputs import CASES, END, PAGE, START, table
from tests.cases.states import state_of


def marked(cases):
    return [
        pytest.param(case, id=str(case), marks=[pytest.mark.slow] if case.slow else [])
        for case in cases
    ]


@pytest.mark.parametrize("case", marked(CASES))
def test_a_bad_input_is_refused_or_answered_and_leaves_everything_as_it_was(case):
    if case.needs:
        pytest.importorskip(case.needs)
    asked = case.build()
    before = state_of(*asked.watched)
    if case.kind is not None:
        with pytest.raises(case.kind, match=case.words):
            asked.ask()
    else:
        found = asked.ask()
        if asked.truth is not None:
            expected = asked.truth()
            tolerance = 1e-10 if expected.dtype == torch.float64 else 1e-5
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    after = state_of(*asked.watched)
    assert {key: after[key] for key in before if after[key] != before[key]} == {}


def test_the_inputs_have_names_of_their_own():
    names = [str(case) for case in CASES]
    assert sorted(set(names)) == sorted(names)


def test_the_table_of_the_documentation_is_what_happens():
    pytest.importorskip("transformers")
    page = PAGE.read_text(encoding="utf-8")
    committed = page.partition(START)[2].partition(END)[0].strip()
    # Otherwise: python -m tests.cases.bad_inputs
    assert committed.splitlines() == table().strip().splitlines()
