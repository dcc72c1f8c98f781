"""The formula against a direct transcription, and the operator's contract."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mt_deepspeed.kernels.manager_aggregation import (
    Philox,
    cpu_impl,
    expert_statistics,
    manager_aggregation,
    mixing_weights,
    using,
)
from mt_deepspeed.kernels.manager_aggregation.operator import _backward, _forward, _statistics
from mt_deepspeed.kernels.manager_aggregation.reference import aggregate
from tests.helpers.aggregation import Case, check, differentiated, needs_cpu_library, variants

DOUBLE = torch.float64


@pytest.fixture(autouse=True, scope="module")
def _operator() -> Iterator[None]:
    """The operator itself, in any dtype."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MT_KERNELS", "reference")
        yield


def _by_hand(
    experts: list[Tensor],
    previous: list[Tensor],
    norm_weight: Tensor,
    norm_bias: Tensor,
    logits: Tensor,
    temperature: Tensor,
    previous_weight: Tensor | None,
    noise: Tensor | None,
    eps: float = 1e-5,
) -> Tensor:
    out = torch.zeros_like(experts[0])
    for b in range(out.shape[0]):
        for t in range(out.shape[1]):
            scores = logits[b, t][:, None] if logits.ndim == 3 else logits
            scores = scores.expand(len(experts), out.shape[2])
            if noise is not None:
                scores = scores + noise[:, b, t]
            weights = torch.exp(scores / temperature)
            weights = weights / weights.sum(0)
            for i, state in enumerate([*experts, *previous]):
                x = state[b, t]
                deviation = torch.sqrt(x.var(unbiased=False) + eps)
                normed = (x - x.mean()) / deviation * norm_weight[i] + norm_bias[i]
                if i < len(experts):
                    out[b, t] += weights[i] * normed
                elif previous_weight is not None:
                    out[b, t] += previous_weight[i - len(experts)] * normed
    return out


@settings(max_examples=40)
@given(
    n=st.integers(1, 5),
    p=st.integers(0, 3),
    shape=st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(2, 7)),
    adaptive=st.booleans(),
    scalar=st.booleans(),
    noise=st.sampled_from(["none", "given"]),
)
def test_formula(
    n: int, p: int, shape: tuple[int, int, int], adaptive: bool, scalar: bool, noise: str
) -> None:
    arguments = Case(n, p, shape, adaptive, scalar, noise, DOUBLE).arguments()
    torch.testing.assert_close(aggregate(**arguments), _by_hand(**arguments), rtol=1e-9, atol=1e-9)


@settings(max_examples=40)
@given(
    n=st.integers(1, 5),
    p=st.integers(0, 3),
    shape=st.tuples(st.integers(0, 2), st.integers(0, 3), st.integers(2, 11)),
    adaptive=st.booleans(),
    scalar=st.booleans(),
    noise=st.sampled_from(["none", "given", "own"]),
)
def test_written_derivatives_are_those_of_the_formula(
    n: int, p: int, shape: tuple[int, int, int], adaptive: bool, scalar: bool, noise: str
) -> None:
    check(Case(n, p, shape, adaptive, scalar, noise, DOUBLE), "reference")


@pytest.mark.parametrize("adaptive", [False, True])
def test_gradients_by_finite_differences(adaptive: bool) -> None:
    arguments = Case(2, 1, (1, 2, 3), adaptive, noise="given", dtype=DOUBLE).arguments()
    names = ("norm_weight", "norm_bias", "logits", "temperature", "previous_weight")

    def run(first: Tensor, second: Tensor, previous: Tensor, *tensors: Tensor) -> Tensor:
        named: Any = dict(zip(names, tensors, strict=True))
        return manager_aggregation([first, second], [previous], **named, noise=arguments["noise"])

    tensors = [*arguments["experts"], *arguments["previous"], *(arguments[name] for name in names)]
    assert torch.autograd.gradcheck(run, [tensor.requires_grad_() for tensor in tensors])


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_second_derivatives_are_refused(backend: str) -> None:
    if backend == "cpu":
        needs_cpu_library()
    arguments = Case().arguments()
    state = arguments["experts"][0].requires_grad_()
    out = manager_aggregation(**arguments, backend=backend)
    (grad,) = torch.autograd.grad(out.square().sum(), state, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_statistics_are_shared_and_change_nothing() -> None:
    case = Case(3, 1, (2, 3, 8), dtype=DOUBLE)
    statistics = expert_statistics(case.arguments()["experts"])
    assert statistics is not None
    assert statistics.shape == (2, 3, 6)
    check(case, "reference", statistics=statistics)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("case", variants(Case()), ids=str)
def test_operators_meet_the_contract_of_torch_library(case: Case, backend: str) -> None:
    """Schema, fake tensors, autograd registration, tracing with symbolic shapes."""
    if backend == "cpu":
        needs_cpu_library()
    call = case.arguments()
    n, shape = case.num_experts, case.shape
    experts = [one.flatten(0, 1) for one in call["experts"]]
    previous = [one.flatten(0, 1) for one in call["previous"]]
    noise = call["noise"]
    philox = noise if isinstance(noise, Philox) else Philox(None, 0, 0.0)  # type: ignore[arg-type]
    common = (
        call["norm_weight"],
        call["norm_bias"],
        call["logits"].flatten(0, 1)[None] if case.adaptive else call["logits"].expand(n, shape[-1]).clone(),
        call["temperature"],
        call["previous_weight"].expand(1, shape[-1]).clone(),
        expert_statistics(call["experts"]),
        noise.flatten(1, 2) if isinstance(noise, Tensor) else None,
        *philox,
        1e-5,
    )
    torch.library.opcheck(_statistics, (experts, 1e-5, backend))
    _, previous_statistics = _forward(experts, previous, *common, backend)
    late = (previous_statistics, torch.randn_like(experts[0]), backend)
    torch.library.opcheck(_backward, (experts, previous, *common, *late))
    for tensor in (*experts, *previous, *common[:5]):
        tensor.requires_grad_()
    torch.library.opcheck(_forward, (experts, previous, *common, backend))


def test_backward_keeps_only_inputs_and_statistics() -> None:
    case = Case(4, 1, (2, 5, 64), adaptive=True, noise="own")
    arguments = case.arguments()
    leaves = [*arguments["experts"], *arguments["previous"]]
    for tensor in leaves:
        tensor.requires_grad_()
    inputs = {tensor.untyped_storage().data_ptr() for tensor in leaves}
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        manager_aggregation(**arguments)
    others = [tensor for tensor in kept if tensor.untyped_storage().data_ptr() not in inputs]
    state = arguments["experts"][0].numel()
    assert len(kept) > len(others) >= 5
    assert max(tensor.numel() for tensor in others) < state, "no state-sized temporary"


def test_checkpointing_recomputes_the_same_noise() -> None:
    arguments = Case(3, 1, (2, 5, 16), adaptive=True, noise="own").arguments()
    states = [state.requires_grad_() for state in arguments["experts"]]

    def run(*experts: Tensor) -> Tensor:
        seed = torch.randint(2**62, (1,))
        noise = arguments["noise"]._replace(seed=seed)
        return manager_aggregation(**{**arguments, "experts": experts, "noise": noise})

    def gradients(checkpointed: bool) -> list[Tensor]:
        torch.manual_seed(5)
        out = checkpoint(run, *states, use_reentrant=False) if checkpointed else run(*states)
        return [out, *torch.autograd.grad(out.square().sum(), states)]

    assert all(map(torch.equal, gradients(True), gradients(False)))


def test_low_precision_experts_are_summed_in_float32() -> None:
    arguments = Case(6, 1, (2, 5, 64), adaptive=True, noise="given", dtype=torch.bfloat16).arguments()
    found = manager_aggregation(**arguments)
    rounded: Any = {
        key: [item.double() for item in value] if isinstance(value, list) else value.double()
        for key, value in arguments.items()
    }
    assert found.dtype == torch.bfloat16
    # Only the last rounding is left: half a unit in the last place of bfloat16.
    torch.testing.assert_close(found.double(), manager_aggregation(**rounded), rtol=2**-8, atol=1e-5)


def test_states_that_are_not_contiguous() -> None:
    arguments = Case(2, 1, (3, 4, 8)).arguments()
    expected = manager_aggregation(**arguments)
    for name in ("experts", "previous"):
        arguments[name] = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in arguments[name]]
    assert not arguments["experts"][0].is_contiguous()
    assert torch.equal(manager_aggregation(**arguments), expected)


def test_weights_sum_to_one_and_temperature_sharpens() -> None:
    logits = torch.randn(2, 3, 4)
    cold, warm = mixing_weights(logits, torch.tensor([0.1])), mixing_weights(logits, torch.tensor([10.0]))
    assert cold.shape == (4, 2, 3, 1)
    torch.testing.assert_close(cold.sum(0), torch.ones(2, 3, 1))
    assert (cold.amax(0) > warm.amax(0)).all()


def test_wrong_arguments_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = Case(2, 1, (1, 1, 4), noise="given").arguments()
    first, second = arguments["experts"]
    seed = torch.zeros(1, dtype=torch.int64)
    for change, message in (
        (
            {"experts": [first, second.bfloat16()]},
            "expert 1 has dtype torch.bfloat16, expected torch.float32",
        ),
        ({"experts": [first, second.to("meta")]}, "expert 1 has device meta, expected cpu"),
        ({"previous": [first.to("meta")]}, "previous 0 has device meta, expected cpu"),
        ({"logits": torch.zeros(2, 4, device="meta")}, "logits has device meta, expected cpu"),
        ({"temperature": torch.ones(0)}, r"temperature has shape \(0,\), expected \(1,\)"),
        ({"statistics": torch.zeros(2, 1, 1)}, r"statistics has shape \(2, 1, 1\), expected \(2, 2, 1\)"),
        ({"statistics": torch.zeros(2, 2, 1).double()}, "statistics has dtype torch.float64, expected"),
        ({"statistics": torch.zeros(2, 2, 1, device="meta")}, "statistics has device meta, expected cpu"),
        ({"noise": Philox(seed.int(), 0, 1.0)}, "seed has dtype torch.int32, expected torch.int64"),
        ({"noise": Philox(seed.to("meta"), 0, 1.0)}, "seed has device meta, expected cpu"),
        ({"previous_weight": None}, "previous_weight"),
        ({"experts": [], "noise": None}, "no experts"),
        ({"logits": torch.zeros(3, 4)}, r"logits has shape \(3, 4\), expected \(2, 4\)"),
        ({"noise": torch.zeros(2, 1, 4)}, "noise has shape"),
        ({"backend": "fortran"}, "backend: found 'fortran', expected auto or one of"),
    ):
        with pytest.raises(ValueError, match=message):
            manager_aggregation(**{**arguments, **change})
    with pytest.raises(ValueError, match="expert 1 has dtype"):
        expert_statistics([first, second.bfloat16()])
    with using("algol"), pytest.raises(ValueError, match="using: found 'algol'"):
        manager_aggregation(**arguments)
    monkeypatch.setenv("MT_KERNELS", "cobol")
    with pytest.raises(ValueError, match="MT_KERNELS: found 'cobol'"):
        manager_aggregation(**arguments)


@pytest.mark.parametrize("case", [Case(noise="own"), Case(adaptive=True), Case(scalar=True)], ids=str)
@pytest.mark.parametrize("compiler", [True, False])
def test_default_of_a_cpu(case: Case, compiler: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MT_KERNELS")
    if not compiler:
        monkeypatch.setattr(cpu_impl, "_missing", lambda: "found no compiler")
        assert expert_statistics(case.arguments()["experts"]) is None
    check(case, "auto")
    check(replace(case, dtype=DOUBLE), "auto")  # by autograd


def test_noise_of_the_default_of_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MT_KERNELS")
    case = Case(2, 0, (4, 64, 128), noise="own")
    call = case.arguments()
    call["norm_weight"].zero_()
    call["norm_bias"].zero_()[0] = 1.0  # the result is the first expert's weight

    def scores(**changes: int) -> Tensor:
        weight = manager_aggregation(**{**call, "noise": call["noise"]._replace(**changes)})
        return weight.logit() * call["temperature"] - (call["logits"][0] - call["logits"][1])

    first = scores()
    assert torch.equal(first, scores())
    # The difference of two independent normals of standard deviation 1/2.
    assert abs(first.std() - 0.5**0.5) < 0.02
    assert abs(first.mean()) < 0.02
    for other in (scores(offset=8), scores(seed=call["noise"].seed + 1)):
        assert abs(torch.corrcoef(torch.stack([first.flatten(), other.flatten()]))[0, 1]) < 0.02


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_compiles_into_one_graph(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MT_KERNELS", backend)
    arguments = Case(3, 1, adaptive=True, noise="own").arguments()

    def run(**call: Any) -> Tensor:
        return manager_aggregation(**call).sin()

    compiled = differentiated(torch.compile(run, backend="aot_eager", fullgraph=True), arguments)
    plain = differentiated(run, arguments)
    for name, value in plain.items():
        torch.testing.assert_close(compiled[name], value)
