"""Retrieval at full size equals brute force: on any number of ranks, from any cache, interrupted or not."""

import dataclasses
import functools
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from mt_deepspeed.data.retrieval_items import RetrievalItems
from mt_deepspeed.data.text import load_tokenizer
from mt_deepspeed.engine.launch import Place
from mt_deepspeed.evaluation.recall import NOT_SCORED, recall
from mt_deepspeed.pretrained.loading import Pretrained, load, save
from mt_deepspeed.scoring.retrieval import RetrievalOptions, retrieve, score_pairs
from mt_deepspeed.scoring.states import different_texts
from mt_deepspeed.tasks import build_task
from mt_deepspeed.tasks.retrieval import RetrievalTask, match_scores
from tests.helpers.datasets import make_rows, write_dataset
from tests.helpers.ranks import run_ranks
from tests.helpers.task_runs import task_config, write_task_root

EVAL_ROWS = 9


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set in two orders, with a caption that several images share, and exported models."""
    folder = write_task_root(tmp_path_factory.mktemp("retrieval"))
    rows = make_rows(EVAL_ROWS, seed=70)
    for row in rows[::3]:
        row["captions"] = [*row["captions"], "the same words for several pictures"]
    write_dataset(folder / "ordered", {"val": rows})
    write_dataset(folder / "few", {"val": rows[:3]})
    write_dataset(folder / "shuffled", {"val": random.Random(0).sample(rows, len(rows))})
    for name, changes in {
        "model": {},
        "other": {"init_std": 0.2},
        "bridge": {"link": {"kind": "bridge_add", "num_text_experts": 2, "num_image_experts": 2}},
        "padding": {"mask_padding_in_managers": False},
    }.items():
        config = task_config(folder, "retrieval", model=changes)
        torch.manual_seed(0)
        task = build_task(config)
        for parameter in task.parameters():  # away from the zeros and ones that many start at
            parameter.data += 0.1 * torch.randn_like(parameter)
        tokenizer = load_tokenizer("tokenizer", folder, config.data.max_text_len)
        save(Pretrained(config, task, tokenizer, {}), folder / name)
    return folder


def opened(
    root: Path, name: str = "model", data: str = "ordered", precision: str = "fp32"
) -> tuple[Any, Any]:
    """A model and the configuration of its evaluation."""
    pretrained = load(root / name)
    chosen = {"eval": [{"path": data, "splits": ["val"]}]}
    train = {"micro_batch_size": 4, "global_batch_size": 4, "precision": precision}
    run = task_config(root, "retrieval", data=chosen, train=train)
    data_config = dataclasses.replace(run.data, padding=pretrained.config.data.padding)
    config = dataclasses.replace(pretrained.config, data=data_config, train=run.train)
    return pretrained, config


def evaluations(place: Place, root: Path) -> dict[str, Any]:
    """Scores by several ways, metrics, and what a second run makes of kept scores; in one process group."""
    keep = root / f"kept-by-{place.world_size}"
    found: dict[str, Any] = {name: _scores(place, root, name) for name in ("model", "bridge", "padding")}
    found["file"] = _scores(place, root, cache_gib=0.0)
    found["half"] = _scores(place, root, precision="bf16")
    found["top 2"] = _scores(place, root, top_k=2)
    found["top 1000"] = _scores(place, root, top_k=1000)
    for data in ("ordered", "shuffled", "few"):
        pretrained, config = opened(root, data=data)
        found[f"metrics {data}"] = retrieve(pretrained, config, place)
        found[f"metrics {data} top 2"] = retrieve(pretrained, config, place, RetrievalOptions(top_k=2))
    found["kept"] = _scores(place, root, keep=keep)
    dist.barrier()
    if place.rank == 0:  # what is kept is not computed again; what is missing is
        marked = keep / "block-000000.npy"
        np.save(marked, np.load(marked) + 7)
        (keep / "block-000001.npy").unlink()
        (keep / "block-000003.npy.123").write_bytes(b"half a file")
    dist.barrier()
    found["resumed"] = _scores(place, root, keep=keep)
    return found


def _scores(place: Place, root: Path, name: str = "model", precision: str = "fp32", **options: Any) -> Any:
    """Numbers and scores of this rank's images, as arrays, which travel between processes."""
    pretrained, config = opened(root, name, precision=precision)
    found = score_pairs(pretrained, config, place, RetrievalOptions(**options))
    return found.image_of_row_R.numpy(), found.scores_RT.numpy()


@pytest.fixture(scope="module")
def found(root: Path) -> dict[int, list[dict[str, Any]]]:
    """Number of ranks -> what each rank found."""
    return {ranks: run_ranks(ranks, evaluations, root) for ranks in (1, 2, 4)}


def whole(parts: list[dict[str, Any]], name: str) -> Tensor:
    """The matrix `[I, T]`; every image is one rank's."""
    rows = np.concatenate([part[name][0] for part in parts])
    assert sorted(rows) == list(range(EVAL_ROWS))
    return torch.from_numpy(np.concatenate([part[name][1] for part in parts])[rows.argsort()])


@functools.cache
@torch.no_grad()
def brute_force(root: Path, name: str = "model") -> tuple[Tensor, RetrievalItems]:
    """Every pair through towers and fusion of its own."""
    pretrained, config = opened(root, name)
    items = RetrievalItems(config, 0, 1)
    assert isinstance(pretrained.task, RetrievalTask)
    found = torch.empty(items.num_images, items.num_texts)
    padded = config.data.max_text_len
    for image, pixels in enumerate(items.pixels([[i] for i in range(items.num_images)])):
        for text, tokens in enumerate(items.tokens):
            ids = torch.full((1, padded), items.pad_id)
            ids[0, : len(tokens)] = torch.from_numpy(np.array(tokens))
            mask = (torch.arange(padded) < len(tokens)).long()[None]
            fused = pretrained.task.model(ids, mask, pixels)
            found[image, text] = match_scores(pretrained.task, fused.cls_feats)[0]
    return found, items


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["model", "bridge", "padding"])
def test_equals_brute_force(root: Path, found: dict[int, Any], name: str) -> None:
    wanted, items = brute_force(root, name)
    assert wanted.std() > 0.01
    for parts in found.values():
        close(whole(parts, name), wanted)
    same = [i for i, ids in enumerate(items.tokens) if np.array_equal(ids, items.tokens[-1])]
    for column in same:  # equal texts have equal scores, to the last bit
        assert torch.equal(whole(found[1], name)[:, column], whole(found[1], name)[:, same[0]])


def test_recall_is_that_of_all_pairs_on_every_rank_and_in_any_order(
    root: Path, found: dict[int, Any]
) -> None:
    wanted, items = brute_force(root)
    counted = recall(wanted, items.image_of_text)
    for parts in found.values():
        for part in parts:
            assert part["metrics ordered"] == pytest.approx(counted)
            assert part["metrics shuffled"] == pytest.approx(counted)
            assert part["metrics shuffled top 2"] == pytest.approx(found[1][0]["metrics ordered top 2"])
            assert part["metrics few"] == pytest.approx(found[1][0]["metrics few"])  # 4 ranks, 3 images


def test_states_in_a_file_and_in_half_precision(root: Path, found: dict[int, Any]) -> None:
    wanted = whole(found[1], "model")
    for parts in found.values():
        close(whole(parts, "file"), wanted)
    half = whole(found[2], "half")
    torch.testing.assert_close(half, wanted, rtol=0.0, atol=0.1)
    assert not torch.equal(half, wanted)


def test_a_shortlist_holds_the_nearest_and_scores_them_exactly(root: Path, found: dict[int, Any]) -> None:
    wanted, items = brute_force(root)
    pretrained, config = opened(root)
    near = contrastive(pretrained, config, items)
    _, text_of = different_texts(items.tokens)
    first_copy = [int((text_of == i).nonzero()[0, 0]) for i in range(int(text_of.max()) + 1)]
    near = near[:, first_copy]
    expected = near >= near.topk(2, dim=1).values[:, -1:]
    expected |= near >= near.topk(2, dim=0).values[-1]
    assert 0 < int(expected.sum()) < expected.numel()
    for parts in found.values():
        scores = whole(parts, "top 2")
        scored = scores != NOT_SCORED
        assert torch.equal(scored, expected[:, text_of])
        close(scores[scored], wanted[scored])
        close(whole(parts, "top 1000"), wanted)


@torch.no_grad()
def contrastive(pretrained: Any, config: Any, items: RetrievalItems) -> Tensor:
    task, length = pretrained.task, config.data.max_text_len
    images = torch.cat(
        [
            task.cross_modal_itc_image_head(task.model.encode_image(pixels)[-1][:, 0])
            for pixels in items.pixels([[i] for i in range(items.num_images)])
        ]
    )
    texts = []
    for tokens in items.tokens:
        ids = torch.full((1, length), items.pad_id)
        ids[0, : len(tokens)] = torch.from_numpy(np.array(tokens))
        mask = (torch.arange(length) < len(tokens)).long()[None]
        texts.append(task.cross_modal_itc_text_head(task.model.encode_text(ids, mask)[-1][:, 0]))
    similarity: Tensor = images @ torch.cat(texts).T
    return similarity


def test_an_interrupted_evaluation_goes_on(root: Path, found: dict[int, Any]) -> None:
    for ranks, parts in found.items():
        wanted = whole(parts, "kept")
        assert torch.equal(wanted, whole(parts, "model"))
        resumed = whole(parts, "resumed")
        assert torch.equal(resumed[0], wanted[0] + 7)
        close(resumed[1:], wanted[1:])
        assert (root / f"kept-by-{ranks}" / "block-000001.npy").exists()


def refusals(place: Place, root: Path, folder: Path) -> list[str]:
    kept = RetrievalOptions(keep=folder)
    found = []

    def attempt(name: str, data: str, options: RetrievalOptions) -> None:
        pretrained, config = opened(root, name, data)
        with pytest.raises(ValueError, match=r"\S") as caught:
            score_pairs(pretrained, config, place, options)
        found.append(str(caught.value))

    pretrained, config = opened(root)
    score_pairs(pretrained, config, place, kept)
    attempt("other", "ordered", kept)
    attempt("model", "shuffled", kept)
    attempt("model", "ordered", dataclasses.replace(kept, top_k=3))
    attempt("model", "ordered", RetrievalOptions(top_k=-1))
    (folder / "block-000002.npy").write_bytes(b"torn")
    attempt("model", "ordered", kept)
    (folder / "identity.json").unlink()
    attempt("model", "ordered", kept)
    return found


def test_another_evaluation_is_refused(root: Path, tmp_path: Path) -> None:
    words = [
        "its model is",
        "its data is",
        "its top_k is 0, here 3",
        "found -1",
        "block-000002.npy: cannot be read",
        "no identity.json",
    ]
    for word, message in zip(words, run_ranks(1, refusals, root, tmp_path)[0], strict=True):
        assert word in message
