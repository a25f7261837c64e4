"""The program that measures what shards take, on a small model."""

import json
from pathlib import Path

import pytest
import torch.distributed as dist

from experiments.sharding import __main__ as program

ROOT = Path(program.__file__).parent


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available(), reason="torch.distributed is not there")
def test_both_ways_give_one_product_and_shards_send_what_is_claimed():
    (plain,), (first, second) = (
        program.run(count, program.QUICK, spread=spread)
        for count, spread in ((1, False), (2, True))
    )
    for rank in (first, second):
        for graph in ("fresh", "retained"):
            norm = plain[graph]["norm of the product"]
            assert rank[graph]["norm of the product"] == pytest.approx(norm, rel=1e-5)
        # One rank of two has half, to the padding of the smallest parameters.
        for graph, transfers in (("fresh", 8), ("retained", 5)):
            units = rank[graph]["bytes sent"] / (program.BATCHES / 2) / (4 * rank["n"] / 2)
            assert units == pytest.approx(transfers, rel=0.1)


def test_the_published_numbers_are_as_the_page_says():
    results = json.loads((ROOT / "results.json").read_text("utf-8"))
    assert program.table(results) in (ROOT / "README.md").read_text("utf-8")
    ranks = {run["N"]: run["ranks"] for run in results["runs"] if run["spread"]}
    for part in ("parameters", "basis"):
        whole = ranks[1][0][part]
        for count in (2, 4):
            for rank in ranks[count]:
                assert rank[part] == pytest.approx(whole / count, rel=0.06)
