"""Tasks: what a model is trained for. A task owns model, heads, losses, metrics and the keys of its batches."""

from mt_deepspeed.config import RunConfig
from mt_deepspeed.tasks.cifar import CifarTask
from mt_deepspeed.tasks.classification import ClassificationTask
from mt_deepspeed.tasks.false_texts import FalseTextsTask
from mt_deepspeed.tasks.glue import GlueTask
from mt_deepspeed.tasks.nlvr2 import Nlvr2Task
from mt_deepspeed.tasks.pretrain import PretrainTask
from mt_deepspeed.tasks.retrieval import ALONE, Ranks, RetrievalTask
from mt_deepspeed.tasks.snli_ve import SnliVETask
from mt_deepspeed.tasks.three_way import ThreeWayTask
from mt_deepspeed.tasks.vqa import VQATask

AnyTask = PretrainTask | ClassificationTask | RetrievalTask | FalseTextsTask | ThreeWayTask

CLASSIFIERS = {
    "vqa": VQATask,
    "snli_ve": SnliVETask,
    "nlvr2": Nlvr2Task,
    "cifar": CifarTask,
    "glue": GlueTask,
}


def build_task(config: RunConfig, ranks: Ranks = ALONE) -> AnyTask:
    """The task `config.task` names, with freshly initialised weights.

    Args:
        config: The run.
        ranks: How rows of all ranks are brought together, for losses over more than a micro-batch.
    """
    if config.task == "pretrain":
        return PretrainTask(config.model, config.objectives)
    if config.task == "retrieval":
        if config.retrieval.objective == "false_texts":
            return FalseTextsTask(config)
        if config.retrieval.objective == "three_way":
            return ThreeWayTask(config, ranks)
        return RetrievalTask(config, ranks)
    return CLASSIFIERS[config.task](config)
