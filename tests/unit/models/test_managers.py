"""Managers alone: noise, initial weights, switches."""

from typing import Any

import pytest
import torch

from mt_deepspeed.config.model import LinkConfig
from mt_deepspeed.kernels.manager_aggregation import philox_normal
from mt_deepspeed.models.managers import AdaptiveManager, StaticManager, draw_seed

N, B, L, D = 4, 16, 12, 32


def _call(manager: Any, noise_seed: torch.Tensor | None = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    experts = [torch.randn(B, L, D, generator=generator) for _ in range(N)]
    previous = [torch.randn(B, L, D, generator=generator)] * manager.num_previous
    other = torch.randn(B, 5, D, generator=generator)
    result: torch.Tensor = manager(experts, previous, other, None, seed=noise_seed)
    return result


def _static() -> StaticManager:
    return StaticManager(LinkConfig(kind="saue"), D, N, 1, all_previous=False, layer=0)


def test_initial_weights_are_uniform_with_the_previous_state_added() -> None:
    manager = _static()
    generator = torch.Generator().manual_seed(0)
    experts = [torch.randn(B, L, D, generator=generator) for _ in range(N)]
    previous = [torch.randn(B, L, D, generator=generator)]
    expected = sum(torch.layer_norm(x, (D,)) for x in experts) / N + torch.layer_norm(previous[0], (D,))
    torch.testing.assert_close(manager(experts, previous, None, None), expected)


@pytest.mark.parametrize("adaptive", [False, True])
def test_noise_has_standard_deviation_one_over_n_per_element(
    adaptive: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = LinkConfig(kind="aaue")
    manager: Any = AdaptiveManager(link, D, N, own_query=False, layer=0) if adaptive else _static()
    seen = {}

    def spy(*args: Any, **kwargs: Any) -> torch.Tensor:
        seen["noise"] = args[7]
        return args[0][0]

    monkeypatch.setattr("mt_deepspeed.models.managers.manager_aggregation", spy)
    torch.manual_seed(1)
    _call(manager, draw_seed(torch.device("cpu")))
    found = seen["noise"]
    noise = found.scale * philox_normal(found.seed, found.offset, N, B * L, D).view(N, B, L, D)
    assert noise.shape == (N, B, L, D)
    assert noise.dtype == torch.float32
    count = noise.numel()
    assert abs(noise.mean()) < 5 / N / count**0.5
    assert abs(noise.std() * N - 1) < 5 / (2 * count) ** 0.5
    flat = noise.flatten(1) * N
    correlation = (flat @ flat.T / flat.shape[1]).fill_diagonal_(0)
    assert correlation.abs().max() < 5 / flat.shape[1] ** 0.5, "experts' noises are independent"
    assert noise.std(dim=-1).min() > 0, "channels of one token differ"
    _call(manager)
    assert seen["noise"] is None


def test_noise_follows_from_its_seed_alone() -> None:
    manager, one, other = _static(), torch.tensor([1]), torch.tensor([2])
    assert torch.equal(_call(manager.train(), one), _call(manager.eval(), one))
    assert not torch.equal(_call(manager, one), _call(manager, other))
    assert torch.equal(_call(manager.train()), _call(manager.eval()))
    assert not torch.equal(_call(manager), _call(manager, one))


@pytest.mark.parametrize("kind", ["saue", "aaue"])
def test_learnable_switches_and_temperature(kind: str) -> None:
    link = LinkConfig(
        kind=kind,  # type: ignore[arg-type]
        temperature=0.5,
        learnable_temperature=False,
        learnable_weight=False,
        weight="scalar",
    )
    manager: Any = (
        StaticManager(link, D, N, 1, all_previous=False, layer=0)
        if kind == "saue"
        else AdaptiveManager(link, D, N, own_query=False, layer=0)
    )
    assert manager.softmax_temperature.item() == 0.5
    assert not manager.softmax_temperature.requires_grad
    scores = manager.layer_scores if kind == "saue" else manager.layer_scores_cross
    assert scores.shape[-1] == 1
    assert not scores.requires_grad


def test_own_query_ignores_the_other_modality() -> None:
    manager = AdaptiveManager(LinkConfig(kind="aaue_own_query"), D, N, own_query=True, layer=0).eval()
    experts, previous = [torch.randn(B, L, D) for _ in range(N)], [torch.randn(B, L, D)]
    first = manager(experts, previous, torch.randn(B, 3, D), None)
    assert torch.equal(first, manager(experts, previous, None, None))
    assert manager.linear_controller.in_features == D


def test_expert_gain_weighs_experts_behind_a_previous_state_only() -> None:
    link = LinkConfig(kind="aaue", expert_gain=0.25)
    first = StaticManager(link, D, N, 0, all_previous=False, layer=0)
    second = AdaptiveManager(link, D, N, own_query=True, layer=1)
    assert first.affine()[0].mean(dim=1).tolist() == [1.0] * N
    assert second.affine()[0].mean(dim=1).tolist() == [0.25] * N + [1.0]
