"""The run configuration: one frozen, typed tree; every number has its unit beside it.

`RunConfig` is what `--print-config` shows and what a run folder keeps as `config.yaml`.
"""

from dataclasses import dataclass, field, replace
from typing import Literal

from mt_deepspeed.config.model import ModelConfig


@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """One shard folder (see data_tools) and the splits of it that are read, in this order."""

    path: str
    """Folder that holds `manifest.json`; relative paths start at `data.root`."""
    splits: tuple[str, ...] = ("train",)
    weight: float | None = None
    """Share of the samples drawn from this data set, relative to the other weights.
    None everywhere: each (image, text) pair is equally likely. Set all or none."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read, and how texts and pictures become tensors."""

    root: str = "."
    """Folder that relative data set and tokenizer paths start from."""
    train: tuple[DatasetConfig, ...] = ()
    eval: tuple[DatasetConfig, ...] = ()
    tokenizer: str = "roberta-base"
    """Folder with `vocab.json` and `merges.txt` (or `tokenizer.json`), or a hub name."""
    max_text_len: int = 50
    """Tokens, special tokens included; longer texts are cut."""
    padding: Literal["auto", "longest", "max_length"] = "auto"
    """`longest`: pad to the longest text of the micro-batch, padding masked everywhere.
    `max_length`: pad to `max_text_len`, as published ManagerTower weights need (their managers attend to padding).
    `auto`: `max_length` for managers that read padding (`aaue` with `model.mask_padding_in_managers` off, which a
    start from a published `.ckpt` switches off); `longest` otherwise."""
    train_transform: str = "clip"
    eval_transform: str = "clip"
    on_bad_sample: Literal["error", "skip"] = "error"
    """A training sample that cannot be read (damaged shard or picture). `error`: the run ends and names it.
    `skip`: a pair drawn from the same data set takes its place; logged, counted and listed in the run folder.
    Evaluation never skips."""
    max_skipped_share: float = 0.001
    """The run ends when a rank skips more of its samples since its start (of 10,000 samples at first)."""
    num_workers: int = 2
    """Loader workers per rank; 0 reads in the training process."""
    worker_kind: Literal["thread", "process"] = "thread"


@dataclass(frozen=True, kw_only=True)
class ObjectivesConfig:
    """Pre-training objectives; weight 0 switches one off and leaves its head out of the model."""

    mlm_weight: float = 1.0
    itm_weight: float = 1.0
    mlm_probability: float = 0.15
    """Share of (whole words') tokens that are masked."""
    whole_word_masking: bool = True
    mlm_layer_norm_eps: float = 1e-12
    """Epsilon of the vocabulary head's LayerNorm; models from `transformers` have another."""
    itm_negatives: Literal["dataset", "in_batch"] = "dataset"
    """`dataset`: a uniformly drawn other image of the same data set; `in_batch`: another image of the micro-batch."""


TOWER_OF_TASK = {"cifar": "vision", "glue": "text"}
"""Tasks whose model is one tower alone -> which one."""

TASKS_WITH_ANSWERS = ("vqa", "cifar")
"""Tasks whose answers, or classes, are named in the shards' manifest."""


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """The head of VQA, SNLI-VE and NLVR2; the classes of CIFAR."""

    layers: Literal[1, 2] = 2
    """1: a single linear map; 2: linear, LayerNorm, GELU, linear."""
    scale: float = 2.0
    """Hidden width of two layers, relative to the text and image features of a pair."""
    num_answers: int = 3129
    """VQA: size of the answer vocabulary, CIFAR: classes; the shards' manifest names them."""
    dropout: float = 0.0
    """NLVR2: on the features of both images."""


@dataclass(frozen=True, kw_only=True)
class GlueConfig:
    """Which task of GLUE."""

    name: Literal["cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte"] = "sst2"

    @property
    def num_classes(self) -> int:
        """Classes of the task; 0: a score is predicted."""
        return {"stsb": 0, "mnli": 3}.get(self.name, 2)


@dataclass(frozen=True, kw_only=True)
class RetrievalConfig:
    """How retrieval is fine-tuned."""

    objective: Literal["itc_itm", "false_texts", "three_way"] = "itc_itm"
    """`itc_itm`: contrastive loss, and matching with negatives drawn by contrastive similarity;
    `false_texts`: each image's own text among false ones, and matching with random images;
    `three_way`: contrastive losses between texts, images and fused pairs, as `transformers` has it."""
    negatives: Literal["global", "local"] = "global"
    """`itc_itm`: hard negatives come from the micro-batches of all ranks, or from the rank's own."""
    num_false_texts: int = 15
    """`false_texts`: false texts per image."""
    itc_size: int = 256
    """Width of the contrastive embeddings."""
    itc_temperature: float = 0.07
    """Initial contrastive temperature."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW, its parameter groups and the learning-rate schedule."""

    lr: float = 1e-5
    """Peak learning rate of the towers."""
    head_lr_multiplier: float = 5.0
    cross_modal_lr_multiplier: float = 5.0
    weight_decay: float = 0.01
    no_decay: Literal["reference", "norms_and_biases"] = "norms_and_biases"
    """`reference`: the name list of the published code, which decays CLIP's and the managers' norm weights;
    `norms_and_biases`: no decay for any bias, norm, scalar or mixing weight."""
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-8
    warmup: float = 0.1
    """Below 1: share of `train.max_steps`; otherwise optimizer steps."""
    schedule: Literal["polynomial", "cosine", "constant"] = "polynomial"
    decay_power: float = 1.0
    end_lr_ratio: float = 0.0
    """Learning rate at the last step, relative to the peak."""
    max_grad_norm: float = 0.0
    """Global L2 norm; 0 switches clipping off."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Length, batch, precision and rhythm of a run."""

    max_steps: int = 100_000
    """Optimizer steps."""
    global_batch_size: int = 4096
    """Samples per optimizer step, over all ranks and accumulation steps."""
    micro_batch_size: int = 8
    """Samples per rank and forward pass."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    seed: int = 0
    activation_checkpointing: int = 0
    """0: none; 1: every layer; k: every k-th layer of the towers and of the cross-modal encoder."""
    compile: bool = False
    """`torch.compile` of each layer of the towers and of the cross-modal encoder; needs a C++ compiler or a GPU."""
    log_every_steps: int = 10
    eval_every_steps: int = 1000
    """0: only at the end."""
    eval_max_samples: int = 0
    """Samples per evaluation; 0: the whole split."""
    max_skipped_steps: int = 10
    """The run stops after this many non-finite steps in a row."""
    spike_threshold: float = 10.0
    """Robust z-score from which a loss or gradient norm is reported, with its samples; 0: never."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When state is saved, which checkpoints stay, and what a run starts from."""

    every_steps: int = 0
    """0: never by step."""
    every_minutes: float | None = None
    """0: never by time; None: from the measured cost of a save and `gpu_hours_per_failure`, 5 to 30 minutes."""
    gpu_hours_per_failure: float = 50_000.0
    """Hours of one rank between failures that end the run. The default is that of Llama 3's training: 419 in 54 days
    on 16,384 GPUs."""
    background: bool = True
    """Training goes on while a copy of the state in CPU memory is written; false: it waits, and no copy is kept."""
    keep_last: int = 2
    best_metric: str = "eval/score"
    """Checkpoint with the highest value is kept; empty: none."""
    init_from: str | None = None
    """Weights to start from: a run, an exported model or a reference checkpoint."""
    resume: Literal["auto", "never", "must"] = "auto"
    """`auto`: newest valid checkpoint of the run folder, if any; `must`: an error without one."""


@dataclass(frozen=True, kw_only=True)
class ResilienceConfig:
    """What a run does when it is stopped, or stops by itself."""

    deadline_margin_s: float = 60.0
    """Seconds that must be left before the end of the job, beside the time a save takes, when a run saves and stops."""
    step_timeout_s: float = 300.0
    """A rank that finishes no micro-batch (or evaluation batch) for so long ends the run."""
    first_step_timeout_s: float = 1800.0
    """The same for the start, until the first step is done, and for saves. Collectives give up two minutes later."""
    max_idle_restarts: int = 3
    """The run refuses to start after this many restarts in a row without a new checkpoint."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything about a run except memory and communication, which `ds_configs/` hold."""

    run_dir: str = "runs/default"
    task: Literal["pretrain", "vqa", "snli_ve", "nlvr2", "retrieval", "cifar", "glue"] = "pretrain"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    objectives: ObjectivesConfig = field(default_factory=ObjectivesConfig)
    """Pre-training only."""
    classifier: ClassifierConfig = field(default_factory=ClassifierConfig)
    """VQA, SNLI-VE, NLVR2 and CIFAR only."""
    glue: GlueConfig = field(default_factory=GlueConfig)
    """GLUE only."""
    retrieval: RetrievalConfig = field(default_factory=RetrievalConfig)
    """Retrieval only."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    resilience: ResilienceConfig = field(default_factory=ResilienceConfig)

    @property
    def reads_texts(self) -> bool:
        """False for a vision tower alone, which needs no tokenizer."""
        return TOWER_OF_TASK.get(self.task) != "vision"

    def __post_init__(self) -> None:
        token_types = self.model.cross_modal.num_token_types
        if self.task == "nlvr2" and token_types != 3:
            raise ValueError(
                f"model.cross_modal.num_token_types: found {token_types}, expected 3: task nlvr2 tells text, first "
                "and second image apart"
            )
        if self.task == "glue":
            _check_glue_splits(self.glue.name, (*self.data.train, *self.data.eval))
        two_towers = self.task not in TOWER_OF_TASK  # a single tower has no managers, whatever the model says
        model = self.model
        if self.data.padding == "auto":
            published = replace(model, mask_padding_in_managers=False)
            starts_published = two_towers and (self.checkpoint.init_from or "").endswith(".ckpt")
            if starts_published and published.managers_read_padding:
                model = published
            fixed = two_towers and model.managers_read_padding
            padding: Literal["longest", "max_length"] = "max_length" if fixed else "longest"
            # The configuration that is printed and kept says what was chosen.
            object.__setattr__(self, "data", replace(self.data, padding=padding))
            object.__setattr__(self, "model", model)
        elif self.data.padding == "longest" and two_towers and model.managers_read_padding:
            raise ValueError(
                "data.padding=longest with model.mask_padding_in_managers=false: the managers would attend to "
                "padding whose length changes from batch to batch; use data.padding=max_length, or mask it"
            )


def _check_glue_splits(name: str, datasets: tuple[DatasetConfig, ...]) -> None:
    """The splits of all tasks stand in one folder and have the same columns: another task's would train unseen."""
    for split in (split for dataset in datasets for split in dataset.splits):
        if not split.startswith(f"{name}-"):
            raise ValueError(
                f"glue.name is {name}: found split {split!r}, expected those that begin with '{name}-'"
            )
