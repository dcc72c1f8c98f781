"""From raw data to an exported model through the command lines, as a user runs them."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import mt_deepspeed
from mt_deepspeed import build_tokenizer, export, show

REPO = Path(__file__).parents[2]

TINY = (
    "model.text.hidden_size=32",
    "model.text.intermediate_size=64",
    "model.text.dropout=0.1",
    "model.vision.width=32",
    "model.cross_modal.hidden_size=32",
    "model.cross_modal.intermediate_size=64",
    "model.cross_modal.dropout=0.1",
    "model.text.vocab_size=512",
    "train.global_batch_size=16",
    "train.micro_batch_size=4",
    "train.max_steps=8",
    "train.log_every_steps=2",
    "train.eval_every_steps=4",
    "train.eval_max_samples=24",
    "checkpoint.every_steps=4",
    "data.train=[{path: coco, splits: [train, restval]}, {path: vg}]",
)


def environment() -> dict[str, str]:
    paths = f"{REPO}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "PATH": tools}


def python(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", *arguments], env=environment(), capture_output=True, text=True, timeout=300
    )
    if check and done.returncode:
        raise AssertionError(f"{' '.join(arguments)}\n{done.stdout}\n{done.stderr}")
    return done


def train_command(shards: Path, run_dir: Path, *settings: str) -> list[str]:
    return [
        "mt_deepspeed.train",
        "--preset",
        "quickstart",
        "--deepspeed_config",
        str(REPO / "ds_configs/zero1.json"),
        "--set",
        f"data.root={shards}",
        f"run_dir={run_dir}",
        *TINY,
        *settings,
    ]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Synthetic COCO and VG shards, a tokenizer, and the list of visual words."""
    folder = tmp_path_factory.mktemp("spine")
    python(
        *["data_tools", "synth", "--layout", "coco", "vg", "--num-images", "80", "--seed", "3"],
        *["--image-size", "48", "--workers", "1", "--out"],
        str(folder / "raw"),
    )
    for name in ("coco", "vg"):
        python(
            "data_tools",
            "convert",
            name,
            "--raw",
            str(folder / "raw" / name),
            "--out",
            str(folder / name),
            "--workers",
            "1",
        )
    build_tokenizer.main(
        [
            "--shards",
            str(folder / "coco"),
            str(folder / "vg"),
            "--vocab-size",
            "512",
            "--out",
            str(folder / "tokenizer"),
        ]
    )
    return folder


@pytest.fixture(scope="module")
def run_dir(shards: Path) -> Path:
    """A finished run of two ranks under the deepspeed launcher."""
    run = shards / "run"
    launcher = [
        *[sys.executable, "-m", "deepspeed.launcher.runner"],
        "--num_gpus",
        "2",
        "--master_port",
        "29731",
        "--module",
    ]
    done = subprocess.run(
        [*launcher, *train_command(shards, run)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return run


def test_a_run_leaves_what_it_promises(run_dir: Path) -> None:
    records = show.read_metrics(run_dir)
    assert [record["step"] for record in records if "train/loss/mlm" in record or "train/mlm" in record] == [
        2,
        4,
        6,
        8,
    ]
    assert {record["step"] for record in records if "eval/itm_accuracy" in record} == {4, 8}
    last = records[-1] | records[-2]
    assert last["eval/score"] == pytest.approx(last["eval/itm_accuracy"] + last["eval/mlm_accuracy"])
    assert list((run_dir / "tensorboard").iterdir())
    versions = json.loads((run_dir / "versions.json").read_text())
    assert torch.__version__.startswith(versions["torch"])


def test_export_evaluate_predict_and_show(
    shards: Path, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, model = shards / "raw" / "visual_words.json", shards / "model"
    export.main(["--checkpoint", str(run_dir), "--out", str(model)])
    assert "equal" in capsys.readouterr().out
    figures = shards / "evaluation.json"
    of_export = ["--checkpoint", str(model), "--shards", str(shards / "coco"), "--out", str(figures)]
    python("mt_deepspeed.evaluate", *of_export, "--visual-words", str(words))
    found = json.loads(figures.read_text())
    assert 0 <= found["visual_right_image"] <= 1
    assert 0 < found["visual_chance"] < 1
    assert found["itm_loss"] > 0
    picture = shards / "predictions.png"
    show.main(
        [
            "masks",
            "--model",
            str(model),
            "--shards",
            str(shards / "coco"),
            "--visual-words",
            str(words),
            "--out",
            str(picture),
        ]
    )
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert "mask 1:" in capsys.readouterr().out
    show.main(["run", "--run", str(run_dir), "--evaluation", str(figures)])
    shown = capsys.readouterr().out
    assert "ITM accuracy, held-out pairs" in shown
    assert "50.0%" in shown


def test_the_exported_model_is_the_run(shards: Path, run_dir: Path) -> None:
    exported = shards / "again"
    export.main(["--checkpoint", str(run_dir), "--out", str(exported)])
    names = load_file(exported / "model.safetensors")
    assert "vit_model.visual.conv1.weight" in names
    assert "cross_modal_text_manager_tower.1.manager_layer.linear_controller.weight" in names
    model = mt_deepspeed.load(exported)
    image = next((shards / "raw" / "coco" / "val2014").glob("*.jpg"))
    guesses = model.fill_mask(image, "a <mask> circle", top=3)
    assert len(guesses) == 1
    assert len(guesses[0]) == 3
    assert guesses[0] == mt_deepspeed.load(run_dir).fill_mask(image, "a <mask> circle", top=3)[0]
    assert 0 <= float(model.match([image], ["a red circle"])[0]) <= 1


def test_kill_and_resume_equals_an_undisturbed_run(shards: Path) -> None:
    whole, cut = shards / "whole", shards / "cut"
    python(*train_command(shards, whole))
    _kill_after_checkpoint(train_command(shards, cut), cut)
    python(*train_command(shards, cut))
    one, two = (export_weights(shards, folder) for folder in (whole, cut))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), name
    other = python(*train_command(shards, whole, "train.seed=1", "train.max_steps=12"), check=False)
    assert other.returncode != 0
    assert "another sample stream" in other.stderr
    assert "seed: 0 -> 1" in other.stderr
    steps = {record["step"]: record for record in show.read_metrics(whole) if "train/grad_norm" in record}
    resumed = {record["step"]: record for record in show.read_metrics(cut) if "train/grad_norm" in record}
    assert steps[8]["train/grad_norm"] == resumed[8]["train/grad_norm"]


def _kill_after_checkpoint(command: Sequence[str], run: Path) -> None:
    """Kills a run with SIGKILL after its first checkpoint and before its end."""
    process = subprocess.Popen(
        [sys.executable, "-m", *command, "train.max_steps=8"],
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 200
    while not (run / "checkpoints" / "step-00000004").exists():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (run / "checkpoints" / "step-00000008").exists()


def export_weights(shards: Path, run: Path) -> dict[str, torch.Tensor]:
    out = shards / f"weights-{run.name}"
    export.main(["--checkpoint", str(run / "checkpoints" / "step-00000008"), "--out", str(out)])
    return load_file(out / "model.safetensors")


def test_wrong_settings_stop_before_anything_starts(shards: Path) -> None:
    refused = shards / "refused"
    done = python(*train_command(shards, refused, "train.micro_batch_size=5"), check=False)
    assert done.returncode != 0
    assert "micro_batch_size" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    done = python(*train_command(shards, refused, "data.train=[{path: nowhere}]"), check=False)
    assert done.returncode != 0
    assert "nowhere" in done.stderr
    assert "Traceback" not in done.stderr
