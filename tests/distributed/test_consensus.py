"""Processes that have drifted apart are told."""

import pytest
import torch
from architectures import build

from smartfrz_hf.distributed.consensus import Ranks, checksum


def test_different_values_are_an_error_that_names_both(monkeypatch):
    ranks = Ranks(1.0)
    ranks.check_equal(3, "the depth")
    assert ranks.gather("a", "a letter") == ["a"]
    monkeypatch.setattr(ranks, "gather", lambda value, about: [7, 7, 9])
    with pytest.raises(RuntimeError, match=r"the sum at step 5 is 7 in process 0 and 9 in process 2"):
        ranks.check_equal(7, "the sum at step 5")


def test_a_checksum_is_of_the_bits():
    model, same = build("bert"), build("bert")
    assert checksum(model.parameters()) == checksum(same.parameters())
    word = same.bert.embeddings.word_embeddings.weight
    with torch.no_grad():
        word.mul_(1 + 1e-6)
    assert checksum(model.parameters()) != checksum(same.parameters())
    pair = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])
    assert checksum(pair) != checksum(pair[::-1]), "places count"
    assert checksum([torch.arange(20_000, dtype=torch.bfloat16)]) != 0
