"""What a run's exit code means, so that a batch script knows whether to start it again."""

from enum import IntEnum


class Exit(IntEnum):
    """Exit codes of `mt_deepspeed.train`; 2 is a wrong command line, as everywhere."""

    FINISHED = 0
    """All steps are done, or the run was asked to stop for good."""
    FAILED = 1
    """An error that a restart would meet again, or a rank that died."""
    REQUEUE = 85
    """Stopped at a step boundary after saving: start me again."""
    BAD_NODE = 86
    """Nodes listed in `RUN/bad_nodes.txt` cannot be used: start me again without them."""
    NO_PROGRESS = 87
    """Several starts in a row made no new step: look at the log before starting again."""
    HUNG = 88
    """Some rank stopped answering; the watchdog ended the others."""
