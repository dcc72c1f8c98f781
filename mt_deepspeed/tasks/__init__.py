"""Tasks: what a model is trained for. A task owns model, heads, losses, metrics and the keys of its batches."""

from mt_deepspeed.config import RunConfig
from mt_deepspeed.tasks.pretrain import PretrainTask

TASKS = {"pretrain": PretrainTask}


def build_task(config: RunConfig) -> PretrainTask:
    """The task `config.task` names, with freshly initialised weights."""
    return TASKS[config.task](config.model, config.objectives)
