"""Retrieval: ranks together equal one large batch, hard negatives, false texts."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from mt_deepspeed.engine.gather import gather_rows
from mt_deepspeed.engine.launch import Place
from mt_deepspeed.tasks import ALONE, Ranks, build_task
from mt_deepspeed.tasks.false_texts import FalseTextsTask
from mt_deepspeed.tasks.retrieval import RetrievalTask, match_scores
from tests.helpers.ranks import run_ranks
from tests.helpers.task_runs import task_config

ROWS = 6


def retrieval_batch(rows: int = ROWS) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    mask = (torch.arange(8) < torch.randint(4, 9, (rows, 1), generator=generator)).long()
    image_ids = torch.tensor([0, 1, 2, 0, 4, 5])[:rows]
    pixels = torch.randn(rows, 3, 16, 16, generator=generator, dtype=torch.float64)
    return {
        "pixels": pixels[image_ids % rows],
        "text_ids": torch.randint(4, 300, mask.shape, generator=generator) * mask + 1 - mask,
        "text_mask": mask,
        "image_ids": image_ids,
        "sample_ids": torch.arange(rows),
    }


def build(ranks: Ranks = ALONE, **changes: Any) -> RetrievalTask:
    torch.manual_seed(0)
    task = build_task(task_config(Path("none"), "retrieval", **changes), ranks)
    assert isinstance(task, RetrievalTask)
    return task.double()


def gradients(task: RetrievalTask, batch: dict[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    losses, _ = task._losses(batch, ranks, drawn=False)
    torch.stack(list(losses.values())).sum().backward()
    found = {name: parameter.grad for name, parameter in task.named_parameters()}
    assert [name for name, gradient in found.items() if gradient is None] == []
    return {"losses": torch.stack(list(losses.values())).detach(), **found}  # type: ignore[dict-item]


def mean_gradients(place: Place, negatives: str) -> dict[str, Any]:
    """Of this rank's share of the batch, averaged over ranks as data-parallel training does."""
    share = ROWS // place.world_size
    batch = {
        key: value[place.rank * share : (place.rank + 1) * share] for key, value in retrieval_batch().items()
    }
    ranks = Ranks(place.rank, gather_rows)
    found = gradients(build(ranks, retrieval={"negatives": negatives}), batch, ranks)
    for value in found.values():
        dist.all_reduce(value)
    return {name: (value / place.world_size).numpy() for name, value in found.items()}


def test_ranks_together_equal_one_large_batch() -> None:
    whole = gradients(build(), retrieval_batch(), ALONE)
    shared = run_ranks(3, mean_gradients, "global")[0]
    assert shared.keys() == whole.keys()
    for name, gradient in whole.items():
        difference = (torch.from_numpy(shared[name]) - gradient).abs().max()
        # Similarities are compared in float32; some gradients vanish but for rounding (key biases).
        assert difference < 1e-5 * max(float(gradient.abs().max()), 1e-3), name
    local = run_ranks(3, mean_gradients, "local")[0]
    itc, itm = local["losses"].tolist()
    assert itc == pytest.approx(float(whole["losses"][0]))  # contrasts all ranks either way
    assert itm != pytest.approx(float(whole["losses"][1]))


def test_training_draws_and_evaluation_does_not() -> None:
    task, batch = build(), retrieval_batch()
    task.eval()
    with torch.no_grad():
        assert task.eval_step(batch)["itm_loss"].equal(task.eval_step(batch)["itm_loss"])
        torch.manual_seed(0)
        drawn = {round(float(task(batch)[0]["itm"]), 9) for _ in range(5)}
    assert len(drawn) > 1
    report = task.eval_step(batch)
    assert report["itm_accuracy"][1] == 3 * ROWS
    assert task.score({name: float(total / count) for name, (total, count) in report.items()}) > 0


def test_a_batch_of_one_image_only_counts_as_matched() -> None:
    task, batch = build(), retrieval_batch()
    batch["image_ids"] = torch.zeros(ROWS, dtype=torch.int64)
    losses, _ = task(batch)
    assert torch.isfinite(losses["itm"])
    for drawn in (True, False):
        with torch.no_grad():
            task.itm_score.fc.weight.zero_()
            task.itm_score.fc.bias.copy_(torch.tensor([0.0, 9.0]))  # says `matched` to everything
            assert task._losses(batch, ALONE, drawn)[1]["itm_accuracy"].tolist() == [3 * ROWS, 3 * ROWS]


def false_texts() -> tuple[FalseTextsTask, dict[str, Tensor]]:
    torch.manual_seed(0)
    task = build_task(task_config(Path("none"), "retrieval", retrieval={"objective": "false_texts"}))
    assert isinstance(task, FalseTextsTask)
    batch = retrieval_batch(3)
    batch["pixels"] = torch.cat([batch["pixels"], batch["pixels"][:1].flip(-1)]).float()
    return task, batch | {
        "choice_ids": torch.stack([batch["text_ids"], batch["text_ids"].roll(1, 0)], dim=1),
        "choice_mask": torch.stack([batch["text_mask"], batch["text_mask"].roll(1, 0)], dim=1),
        "itm_image_index": torch.tensor([0, 3, 2]),
        "itm_labels": torch.tensor([1, 0, 1]),
    }


def test_false_texts_equal_separate_passes() -> None:
    task, batch = false_texts()
    losses, _ = task(batch)
    torch.stack(list(losses.values())).sum().backward()
    assert [name for name, p in task.named_parameters() if p.grad is None] == [
        "itm_score.fc.weight",
        "itm_score.fc.bias",
    ]
    with torch.no_grad():
        scores = [
            task.rank_output(
                task.model(
                    batch["choice_ids"][:, k], batch["choice_mask"][:, k], batch["pixels"][:3]
                ).cls_feats
            )
            for k in (0, 1)
        ]
        wanted = torch.nn.functional.cross_entropy(
            torch.cat(scores, dim=1), torch.zeros(3, dtype=torch.int64)
        )
        images = batch["pixels"][batch["itm_image_index"]]
        matched = task.itm_score(task.model(batch["text_ids"], batch["text_mask"], images).cls_feats)
        torch.testing.assert_close(losses["irtr"].detach(), wanted)
        torch.testing.assert_close(
            losses["itm"].detach(), torch.nn.functional.cross_entropy(matched, batch["itm_labels"])
        )


@pytest.mark.parametrize("objective", ["itc_itm", "false_texts", "three_way"])
def test_pictures_of_the_first_batch_change_no_figure(objective: str) -> None:
    torch.manual_seed(0)
    task: Any
    if objective == "false_texts":
        task, batch = false_texts()
    else:
        task = build_task(task_config(Path("none"), "retrieval", retrieval={"objective": objective}))
        batch = {**retrieval_batch(), "pixels": retrieval_batch()["pixels"].float()}
    task.eval()
    with torch.no_grad():
        first, second = task.eval_step(batch), task.eval_step(batch)
    assert first.keys() == second.keys()
    for name, found in first.items():
        torch.testing.assert_close(found, second[name])
    drawn = task.heatmaps()
    assert drawn.keys() == {"manager_weights/text", "manager_weights/image", "attention/text_over_image"}
    assert drawn["attention/text_over_image"].shape[2] == 3
    assert task.heatmaps() == {}


def test_the_score_starts_as_the_matching_logit() -> None:
    task, batch = false_texts()
    with torch.no_grad():
        cls_feats = task.model(batch["text_ids"], batch["text_mask"], batch["pixels"][:3]).cls_feats
        before = match_scores(task, cls_feats)
        task.rank_from_matching()
        after = match_scores(task, cls_feats)
        torch.testing.assert_close(after, task.itm_score(cls_feats)[:, 1])
    assert not torch.allclose(before, after)
    with pytest.raises(AttributeError):
        match_scores(object(), cls_feats)
