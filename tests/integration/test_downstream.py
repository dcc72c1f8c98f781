"""Every task from its own synthetic layout: converted, fine-tuned with both eyes and blind, measured and tabled."""

import csv
import math
from pathlib import Path

import pytest
import torch

from benchmarks import downstream
from benchmarks.record import measured
from data_tools.cli import main
from mt_deepspeed.config import load_config
from mt_deepspeed.data.pipeline import eval_batches
from mt_deepspeed.data.text import load_tokenizer, train_tokenizer
from mt_deepspeed.engine.launch import Place
from mt_deepspeed.pretrained.loading import Pretrained, save
from mt_deepspeed.tasks import build_task
from tests.helpers.datasets import VOCABULARY
from tests.helpers.ranks import run_ranks

LAYOUTS = {"vqav2": 60, "snli_ve": 60, "nlvr2": 60, "flickr30k": 40}
"""Layout -> records, of which a few are held out."""

SETTINGS = [
    f"model.text.vocab_size={VOCABULARY}",
    "train.global_batch_size=16",
    "train.micro_batch_size=16",
    "train.max_steps=2",
    "train.eval_every_steps=1",
    "train.eval_max_samples=16",
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of every layout, a tokenizer, and a model that knows nothing."""
    root = tmp_path_factory.mktemp("world")
    (root / "answers.json").write_text('["yes", "no", "1", "2", "3", "4", "red", "blue", "small", "large"]')
    for layout, count in LAYOUTS.items():
        options = ["--num-images", str(count), "--image-size", "48", "--workers", "1"]
        assert main(["synth", "--layout", layout, "--out", str(root / "raw"), *options]) == 0
        more = ["--answers", str(root / "answers.json")] if layout == "vqav2" else []
        raw, out = str(root / "raw" / layout), str(root / layout)
        assert main(["convert", layout, "--raw", raw, "--out", out, "--workers", "1", *more]) == 0
    train_tokenizer(["a large red circle", "two small blue squares"] * 20, root / "tokenizer", VOCABULARY)
    config = load_config("quickstart", (), [f"data.root={root}", *SETTINGS])
    tokenizer = load_tokenizer("tokenizer", root, config.data.max_text_len, special_in_text=True)
    save(Pretrained(config, build_task(config), tokenizer, {}), root / "model")
    return root


def run_benchmark(place: Place, world: Path, file: Path) -> str:
    arguments = ["--shards", str(world), "--pretrained", str(world / "model"), "--seeds", "0"]
    arguments += ["--save", str(file), "--set", *SETTINGS, "classifier.num_answers=10"]
    downstream.measure_all(place, downstream.parse(arguments))
    return downstream.table(measured(file, downstream.COLUMNS))


@pytest.mark.slow
def test_every_task_trains_and_is_measured_blind_too(world: Path, tmp_path: Path) -> None:
    file = tmp_path / "downstream.csv"
    (table,) = run_ranks(1, run_benchmark, world, file, timeout_s=400.0)
    rows = list(csv.DictReader(file.open(newline="")))
    runs = {(row["task"], row["way"]) for row in rows}
    seeing = {(task, way) for task in downstream.TESTED for way in ("pretrained", "scratch")}
    assert runs == seeing | {(task, way) for task in ("vqa", "snli-ve", "nlvr2") for way in downstream.BLIND}
    for row in rows:
        assert 0 <= float(row["value"]) <= 1
        assert [point.split(":")[0] for point in row["curve"].split()] == ["1", "2"]
    assert table.count("\n") == 1 + len(downstream.TESTED)
    run_ranks(1, run_benchmark, world, file)  # everything is there already
    assert len(file.read_text().splitlines()) == 1 + len(rows)


@pytest.mark.parametrize("task", sorted(downstream.TESTED.keys() - set(downstream.RANKED)))
def test_a_blind_batch_shows_nothing_of_what_it_hides(world: Path, task: str) -> None:
    settings = [f"data.root={world}", *SETTINGS]
    config = load_config(f"quickstart-{task}", (), [*settings, "classifier.num_answers=10"])
    batch = next(eval_batches(config, 0, 1))
    text = downstream.blind(batch, "text_only")
    assert text["pixels"].flatten(2).unique(dim=2).shape == (len(batch["pixels"]), 3, 1)
    assert torch.equal(text["text_ids"], batch["text_ids"])
    image = downstream.blind(batch, "image_only")
    assert torch.equal(image["pixels"], batch["pixels"])
    assert len(image["text_ids"].unique(dim=0)) == 1
    assert image["text_ids"][0, :2].tolist() == load_tokenizer("tokenizer", world, 5).encode("").ids.tolist()
    assert (image["text_mask"].sum(dim=1) == 2).all()
    assert downstream.blind(batch, "pretrained") is batch


def test_chance() -> None:
    labels = [{"labels": torch.tensor([0, 2, 2])}, {"labels": torch.tensor([1])}]
    assert downstream.best_constant(labels) == 0.5
    scores = [{"answer_scores": torch.tensor([[1.0, 0.3], [0.0, 0.9]])}]
    assert downstream.best_constant(scores) == pytest.approx(0.6)
    # Texts: 5 of 50, 5 and 10 of which are drawn; images: 10.
    missed = [45 / 50, math.comb(45, 5) / math.comb(50, 5), math.comb(45, 10) / math.comb(50, 10)]
    expected = (3 - sum(missed) + 0.1 + 0.5 + 1.0) / 6
    assert downstream.mean_recall_by_chance(torch.full((10,), 5)) == pytest.approx(expected)
