"""GLUE's metrics, which are not means over samples: all predictions `[N]` and labels `[N]` at once, float64.

Definitions as in the benchmark (arXiv 1804.07461) and its reference implementation; where a ratio is 0 / 0 (nothing
but one class, equal scores everywhere) the figure is 0.
"""

from collections.abc import Callable

from torch import Tensor

Metric = Callable[[Tensor, Tensor], float]


def accuracy(predicted_N: Tensor, labels_N: Tensor) -> float:
    """Share of equal ones."""
    return (predicted_N == labels_N).double().mean().item()


def f1(predicted_N: Tensor, labels_N: Tensor) -> float:
    """Harmonic mean of precision and recall of class 1."""
    true = ((predicted_N == 1) & (labels_N == 1)).sum().item()
    both = ((predicted_N == 1).sum() + (labels_N == 1).sum()).item()
    return 2 * true / both if both else 0.0


def matthews(predicted_N: Tensor, labels_N: Tensor) -> float:
    """Matthews correlation of two classes: Pearson's, of the class numbers 0 and 1."""
    return pearson(predicted_N, labels_N)


def pearson(x_N: Tensor, y_N: Tensor) -> float:
    """Linear correlation."""
    x_N, y_N = x_N.double() - x_N.double().mean(), y_N.double() - y_N.double().mean()
    spread = (x_N.square().sum() * y_N.square().sum()).sqrt().item()
    return (x_N @ y_N).item() / spread if spread else 0.0


def spearman(x_N: Tensor, y_N: Tensor) -> float:
    """Correlation of the ranks; equal values share the mean of theirs."""
    return pearson(_ranks(x_N), _ranks(y_N))


def _ranks(x_N: Tensor) -> Tensor:
    _, place_N, counts = x_N.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0)
    return (last.double() - (counts - 1) / 2)[place_N]


METRICS: dict[str, dict[str, Metric]] = {
    "cola": {"matthews": matthews},
    "sst2": {"accuracy": accuracy},
    "mrpc": {"f1": f1, "accuracy": accuracy},
    "qqp": {"f1": f1, "accuracy": accuracy},
    "stsb": {"spearman": spearman, "pearson": pearson},
    "mnli": {"accuracy": accuracy},
    "qnli": {"accuracy": accuracy},
    "rte": {"accuracy": accuracy},
}
"""Task -> its metrics by name; the first one chooses checkpoints."""
