"""The losses of candidates where the batches of two processes are not alike: all go the same way."""

import pytest
import torch

import peft_kernels as pk
from peft_kernels.ist import IST, ISTConfig, parallel
from tests.ist.test_estimator import SETS, some_labels
from tests.ist.test_ist import llama

SECOND = {
    "no labels": {"labels": torch.full((4, 9), -100)},
    "packed": {"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])},
}


def estimated(rank: int, other: str | None) -> tuple[list[list[float]], int | None, int | None, str]:
    model = llama(3)
    pk.integrations.peft.accelerate(model)
    ist = IST(model, ISTConfig(candidates_per_forward=3))
    batch = some_labels(rank) | (SECOND[other] if rank == 1 and other else {})
    found = []
    for _ in range(2):
        losses, weight = ist.estimator(SETS, batch)
        found.append(parallel.joined_losses(losses, weight, torch.device("cpu")))
    return found, ist.estimator.shift, ist.estimator.together, ist.estimator.why


@pytest.mark.parametrize(("other", "together"), [(None, 3), ("no labels", 3), ("packed", 1)])
def test_all_go_the_same_way(ranks, other, together):
    (plain, again), shift, found, why = ranks.run(estimated, other)[0]
    second = ranks.run(estimated, other)[1]
    assert second[:3] == ([plain, again], shift, found)
    assert shift == 1 and found == together, why
    torch.testing.assert_close(again, plain, rtol=2e-6, atol=2e-6)
    if other == "packed":
        assert "another process has a batch of another kind" in why
        assert "packed" in second[3]
    if other == "no labels":
        alone = IST(llama(3), ISTConfig(estimator="one-by-one")).estimator(SETS, some_labels(0))[0]
        torch.testing.assert_close(plain, alone, rtol=2e-6, atol=2e-6)
