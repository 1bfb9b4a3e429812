"""Embeddings and the 32 bits that bitsandbytes keeps theirs in."""

from __future__ import annotations

from typing import Any

import bitsandbytes
import pytest
from optimizer_cases import bits, manager
from torch import nn

from automagic_bnb import Automagic8bit, Automagic32bit


def embedding_bits(opt: Any, module: nn.Module, tools: Any) -> list[int]:
    tools.train(opt, list(module.parameters()), range(2))
    return [bits(opt, p) for p in module.parameters() if p.numel() >= 4096]


def test_bitsandbytes_stable_embedding_has_32bit_state(tools: Any) -> None:
    """Through the override it registers for itself; no option is needed."""
    model = nn.ModuleDict({"words": bitsandbytes.nn.StableEmbedding(64, 64), "head": nn.Linear(64, 64)})
    assert embedding_bits(Automagic8bit(model.parameters(), lr=1e-3), model, tools) == [32, 8]
    assert id(model["head"].weight) not in manager().pid2config


def test_a_stable_embedding_of_another_optimizer_is_let_be(tools: Any) -> None:
    """bitsandbytes lists every such module of the process; only those with our parameters are ours."""
    elsewhere, mine = bitsandbytes.nn.StableEmbedding(64, 64), nn.Linear(64, 64)
    assert embedding_bits(Automagic8bit(mine.parameters(), lr=1e-3), mine, tools) == [8]
    assert id(elsewhere.weight) not in manager().pid2config


def test_an_own_override_stands_above_the_modules(tools: Any) -> None:
    """The user's word for a StableEmbedding's weight wins."""
    model = bitsandbytes.nn.StableEmbedding(64, 64)
    manager().override_config(model.weight, "optim_bits", 8)
    assert embedding_bits(Automagic8bit(model.parameters(), lr=1e-3), model, tools) == [8]


@pytest.mark.parametrize("how", ["named parameters", "marked weights"])
def test_stable_emb_keeps_embeddings_in_32_bits(how: str, tools: Any, no_warnings: None) -> None:
    """Embeddings are known by their names, or by a mark on the weight."""
    model = nn.ModuleDict({"embed_tokens": nn.Embedding(64, 64), "head": nn.Linear(64, 64)})
    if how == "marked weights":
        model["embed_tokens"].weight._is_embedding = True
    params = model.named_parameters() if how.startswith("named") else model.parameters()
    assert embedding_bits(Automagic8bit(params, lr=1e-3, stable_emb=True), model, tools) == [32, 8]


def test_without_stable_emb_embeddings_are_like_the_rest(tools: Any) -> None:
    """The negative control."""
    model = nn.ModuleDict({"embed_tokens": nn.Embedding(64, 64), "head": nn.Linear(64, 64)})
    assert embedding_bits(Automagic8bit(model.named_parameters(), lr=1e-3), model, tools) == [8, 8]


def test_stable_emb_warns_where_nothing_can_be_recognised(tools: Any) -> None:
    """Plain parameters carry no names: the warning names both remedies."""
    model = nn.Embedding(64, 64)
    opt = Automagic8bit(model.parameters(), lr=1e-3, stable_emb=True)
    with pytest.warns(UserWarning, match=r"stable_emb=True: has no effect.*named_parameters\(\).*_is_embedding"):
        tools.train(opt, list(model.parameters()), range(1))


def test_stable_emb_is_silent_where_it_is_served(tools: Any, no_warnings: None) -> None:
    """bitsandbytes' own embedding, 32-bit state, names without an embedding, and empty groups give no warning."""
    stable, linear = bitsandbytes.nn.StableEmbedding(64, 64), nn.Linear(4, 4)
    for opt in (
        Automagic8bit(stable.parameters(), lr=1e-3, stable_emb=True),
        Automagic32bit(linear.parameters(), lr=1e-3, stable_emb=True),
        Automagic8bit(linear.named_parameters(), lr=1e-3, stable_emb=True),
        Automagic8bit([{"params": []}], lr=1e-3, stable_emb=True),
    ):
        tools.train(opt, [p for group in opt.param_groups for p in group["params"]], range(1))
