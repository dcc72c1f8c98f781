"""Raw files of CIFAR and GLUE in their official layouts, drawn from a seed."""

from pathlib import Path

import numpy as np

GLUE_HEADERS = {
    "CoLA": "",
    "SST-2": "sentence\tlabel",
    "MRPC": "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String",
    "QQP": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
    "STS-B": "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
    "MNLI": "index\tpromptID\tpairID\tgenre\tsentence1\tsentence2\tlabel1\tgold_label",
    "QNLI": "index\tquestion\tsentence\tlabel",
    "RTE": "index\tsentence1\tsentence2\tlabel",
}
NOUNS = ("film", "story", "cast", "plot", "song", "scene", "end", "joke")


def cifar_record(label: int, draws: np.random.Generator, coarse: bool = False) -> bytes:
    """A picture whose colour follows from its label (red: `25 * (7 * label % 10) + 10`), behind its label bytes."""
    red = 25 * (7 * label % 10) + 10
    levels = np.array([red, 128, 255 - red]).repeat(32 * 32)
    pixels = np.clip(draws.normal(levels, 8), 0, 255).astype(np.uint8)
    return bytes([7, label] if coarse else [label]) + pixels.tobytes()


def write_cifar10(raw: Path, train: int = 3, test: int = 4, classes: int = 10, seed: int = 0) -> Path:
    """`train` records in each of the five batches; labels take turns."""
    folder = raw / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    draws = np.random.default_rng(seed)
    counts = {**{f"data_batch_{number}.bin": train for number in range(1, 6)}, "test_batch.bin": test}
    for name, count in counts.items():
        labels = draws.integers(classes, size=count) if count > classes else np.arange(count) % classes
        (folder / name).write_bytes(b"".join(cifar_record(int(one), draws) for one in labels))
    (folder / "batches.meta.txt").write_text("".join(f"class {i}\n" for i in range(10)) + "\n")
    return folder


def write_cifar100(raw: Path, labels: tuple[int, ...] = (3, 99, 0)) -> Path:
    """The same labels in both sets."""
    folder = raw / "cifar-100-binary"
    folder.mkdir(parents=True)
    draws = np.random.default_rng(0)
    for name in ("train.bin", "test.bin"):
        (folder / name).write_bytes(b"".join(cifar_record(one, draws, coarse=True) for one in labels))
    (folder / "fine_label_names.txt").write_text("".join(f"fine {i}\n" for i in range(100)))
    return folder


def glue_line(task: str, number: int, first: str, second: str, label: str) -> str:
    """One line of a task's files."""
    return {
        "CoLA": f"gj04\t{label}\t*\t{first}",
        "SST-2": f"{first} \t{label}",
        "MRPC": f"{label}\t{100 + number}\t{200 + number}\t{first}\t{second}",
        "QQP": f"{number}\t1\t2\t{first}\t{second}\t{label}",
        "STS-B": f"{number}\tgenre\tfile\t2012\t{number}\ta\tb\t{first}\t{second}\t{label}",
        "MNLI": f"{number}\t1\t2\tgenre\t{first}\t{second}\t{label}\t{label}",
        "QNLI": f"{number}\t{first}\t{second}\t{label}",
        "RTE": f"{number}\t{first}\t{second}\t{label}",
    }[task]


def glue_samples(task: str, count: int, seed: int) -> list[tuple[str, str, str]]:
    """(first, second, label): a word of the sentence tells the label."""
    draws = np.random.default_rng(seed)
    found = []
    for number in range(count):
        noun, other = draws.choice(NOUNS, 2, replace=False)
        words: tuple[str, ...]
        labels: tuple[str, ...]
        if task in ("CoLA", "SST-2"):
            words, labels = ("bad", "good"), ("0", "1")
        elif task == "STS-B":
            words, labels = ("no", "half", "all"), ("0.0", "2.500", "5.000")
        elif task == "MNLI":
            words, labels = ("no", "half", "all"), ("contradiction", "neutral", "entailment")
        elif task in ("QNLI", "RTE"):
            words, labels = ("all", "no"), ("entailment", "not_entailment")
        else:
            words, labels = ("no", "all"), ("0", "1")
        kind = number % len(words)
        if (
            task == "STS-B"
        ):  # equal texts would have scores that differ in their last bits, and so change ranks
            noun = f"{noun} {number}"
        found.append((f"the {noun} is {words[kind]}", f'a "{other}" it is', labels[kind]))
    return found


def write_glue(raw: Path, tasks: tuple[str, ...] = tuple(GLUE_HEADERS), train: int = 7, dev: int = 5) -> Path:
    """`glue_data/` with the training and development sets of some tasks."""
    folder = raw / "glue_data"
    for task in tasks:
        devs = ("dev_matched", "dev_mismatched") if task == "MNLI" else ("dev",)
        for seed, (name, count) in enumerate({"train": train, **dict.fromkeys(devs, dev)}.items()):
            lines = [GLUE_HEADERS[task]] if GLUE_HEADERS[task] else []
            samples = glue_samples(task, count, seed)
            lines += [glue_line(task, number, *sample) for number, sample in enumerate(samples)]
            path = folder / task / f"{name}.tsv"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n".join(lines) + "\n", "utf-8")
        (folder / task / "test.tsv").write_text("index\tsentence\n0\tno label here\n", "utf-8")
    return folder
