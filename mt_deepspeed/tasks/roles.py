"""The learning-rate groups of the published code."""

HEADS = ("mlm_score", "itm_score", "_classifier.")


def published_role(name: str) -> str:
    """`head`, `cross_modal`, or `tower` for all else (which includes type and layer embeddings)."""
    if any(head in name for head in HEADS):
        return "head"
    return "cross_modal" if "cross_modal" in name else "tower"
