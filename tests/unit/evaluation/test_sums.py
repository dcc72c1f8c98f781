import math

import torch

from mt_deepspeed.evaluation.sums import Report, add, averages, pair


def test_pairs_add_up_over_batches_and_ranks() -> None:
    first: Report = {}
    add(first, {"a": pair(torch.tensor(3), 4)})
    add(first, {"a": pair(1.0, 4), "b": pair(0.0, 0)})
    second = {"a": pair(0.0, 8), "b": pair(0.0, 0)}

    def reduce(table: torch.Tensor) -> None:  # what an all-reduce over two ranks does
        table += torch.stack([second["a"], second["b"]])

    result = averages(first, reduce)
    assert result["a"] == 0.25
    assert math.isnan(result["b"])
    assert averages({}) == {}
