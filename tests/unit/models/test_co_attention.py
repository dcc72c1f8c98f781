"""Attention to and from a few tokens, beside the same written out, whatever side the projections are applied to."""

import itertools

import pytest
import torch
from torch import Tensor

from mt_deepspeed.config.model import CrossModalConfig
from mt_deepspeed.models.co_attention import AttentionBlock

D, HEADS = 32, 2
SHAPES = {
    "from many to few": (40, 3),
    "from few to many": (3, 40),
    "alike": (9, 9),
    "one": (1, 40),
    "to one": (40, 1),
}
FEW = {"from many to few", "from few to many", "one", "to one"}


def make(dropout: float = 0.0) -> AttentionBlock:
    torch.manual_seed(0)
    block = AttentionBlock(
        CrossModalConfig(hidden_size=D, num_heads=HEADS, intermediate_size=D, dropout=dropout)
    ).double()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return block


def written_out(block: AttentionBlock, hidden: Tensor, context: Tensor, attend: Tensor | None) -> Tensor:
    return block.output(mixed(block, hidden, context, attend), hidden)  # type: ignore[no-any-return]


def weights_of(block: AttentionBlock, hidden: Tensor, context: Tensor, attend: Tensor | None) -> Tensor:
    query, key = split(block.self.query(hidden)), split(block.self.key(context))
    scores = query @ key.transpose(-1, -2) / (D / HEADS) ** 0.5
    if attend is not None:
        scores = scores.masked_fill(~attend, float("-inf"))
    return scores.softmax(-1)


def mixed(block: AttentionBlock, hidden: Tensor, context: Tensor, attend: Tensor | None) -> Tensor:
    value = split(block.self.value(context))
    return (weights_of(block, hidden, context, attend) @ value).transpose(1, 2).flatten(2)


def split(projected: Tensor) -> Tensor:
    return projected.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def inputs(shape: str, masked: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(1)
    length, others = SHAPES[shape]
    hidden = torch.randn(2, length, D, generator=generator, dtype=torch.float64)
    context = torch.randn(2, others, D, generator=generator, dtype=torch.float64)
    attend = None
    if masked:
        attend = torch.rand(2, 1, 1, others, generator=generator) < 0.6
        attend[..., 0] = True
    return hidden, context, attend


@pytest.mark.parametrize(("shape", "masked"), list(itertools.product(SHAPES, (False, True))))
def test_result_and_every_gradient_are_those_of_attention_written_out(shape: str, masked: bool) -> None:
    block = make()
    hidden, context, attend = inputs(shape, masked)
    leaves = [hidden.requires_grad_(), context.requires_grad_(), *block.parameters()]
    found = []
    for result in (block(hidden, context, attend), written_out(block, hidden, context, attend)):
        gradients = torch.autograd.grad(result.square().sum(), leaves)
        found.append([result, *gradients])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_longer_sequence_meets_no_matrix(shape: str) -> None:
    block = make()
    hidden, context, attend = inputs(shape, True)
    projected = []
    for part in (block.self.query, block.self.key, block.self.value):
        part.register_forward_hook(lambda module, given, out: projected.append(given[0].shape[-2]))
    block(hidden, context, attend)
    assert (max(projected) < 40) == (shape in FEW | {"alike"})


@pytest.mark.parametrize("shape", SHAPES)
def test_a_batch_of_none(shape: str) -> None:
    hidden, context, attend = inputs(shape, True)
    assert attend is not None
    found = make()(hidden[:0].requires_grad_(), context[:0], attend[:0])
    assert found.shape == (0, *hidden.shape[1:])
    found.sum().backward()


@pytest.mark.parametrize("shape", SHAPES)
def test_weights_that_were_asked_for(shape: str) -> None:
    block = make().eval()
    hidden, context, attend = inputs(shape, True)
    block.self.seen = []
    block(hidden, context, attend)
    (seen,) = block.self.seen
    torch.testing.assert_close(seen, weights_of(block, hidden, context, attend))
    assert attend is not None
    assert not bool(seen[~attend.expand_as(seen)].any())


@pytest.mark.parametrize("shape", sorted(FEW))
def test_dropout_has_the_mean_and_spread_of_dropped_weights(shape: str) -> None:
    """A dropped weight takes its share of the value's bias along."""
    block, rounds = make(dropout=0.3), 2000
    hidden, context, attend = (None if part is None else part[:1] for part in inputs(shape, True))
    assert hidden is not None
    assert context is not None
    outputs: list[Tensor] = []
    block.output.dense.register_forward_hook(lambda module, given, out: outputs.append(out))
    with torch.no_grad():
        for _ in range(rounds):
            block(hidden, context, attend)
        found = torch.stack(outputs)
        weights = weights_of(block, hidden, context, attend)
        value = split(block.self.value(context))
        dropped = torch.dropout(weights.expand(rounds, *weights.shape), 0.3, True)
        expected = block.output.dense((dropped @ value).transpose(2, 3).flatten(3))
    error = (found.mean(0) - expected.mean(0)) / expected.std(0) * (rounds / 2) ** 0.5
    assert float(error.abs().max()) < 6  # up to a thousand normal numbers
    torch.testing.assert_close(found.std(0), expected.std(0), rtol=0.15, atol=0.0)


@pytest.mark.parametrize("shape", sorted(FEW))
def test_half_precision_is_close(shape: str) -> None:
    block = make().float()
    hidden, context, attend = inputs(shape, True)
    expected = written_out(block, hidden.float(), context.float(), attend).detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = block(hidden.float(), context.float(), attend)
        usual = written_out(block, hidden.float(), context.float(), attend)
    error, usual_error = (float((one.detach().float() - expected).norm()) for one in (found, usual))
    assert error < 1.5 * usual_error
