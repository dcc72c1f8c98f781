"""A plan as text."""

from __future__ import annotations

from mt_deepspeed.planning.estimate import GIB, RESERVED_GIB, USABLE_SHARE, Plan, StagePlan

COLUMNS = ("stage", "weights", "master", "Adam", "gradients", "buffers", "activations", "total", "")


def as_text(plan: Plan) -> str:
    """Sections of aligned lines; sizes in GiB."""
    parts = [_what(plan), _memory(plan), _largest(plan), _advice(plan)]
    return "\n\n".join(part for part in parts if part)


def _what(plan: Plan) -> str:
    cluster = plan.cluster
    return _pairs(
        [
            ("model", f"{plan.parameters:,} parameters, {plan.trained_parameters:,} trained"),
            (
                "GPUs",
                f"{cluster.nodes} x {cluster.gpus_per_node} {cluster.gpu}: {cluster.kind.memory_gib:g} GiB each, "
                f"{plan.usable_bytes / GIB:.1f} to plan with (less {RESERVED_GIB:g} for CUDA and NCCL, then "
                f"{1 - USABLE_SHARE:.0%} for fragments)",
            ),
            ("arithmetic", f"{plan.precision}, float32 weights; texts of {plan.text_tokens} tokens"),
        ]
    )


def _memory(plan: Plan) -> str:
    first = plan.stages[0]
    title = f"Memory per GPU in GiB at micro-batch {first.micro_batch}, by ZeRO stage"
    rows = [COLUMNS, *(_row(stage) for stage in plan.stages)]
    lines = [title, *_aligned(rows)]
    for stage in plan.stages:
        if stage.states.host or stage.states.nvme:
            lines.append(
                f"stage {stage.stage} also takes {stage.states.host * plan.cluster.gpus_per_node / GIB:.1f} GiB of "
                f"each node's memory and {stage.states.nvme * plan.cluster.gpus_per_node / GIB:.1f} of its NVMe"
            )
    return "\n".join(lines)


def _row(plan: StagePlan) -> tuple[str, ...]:
    states = plan.states
    sizes = (
        states.weights,
        states.master,
        states.moments,
        states.gradients,
        states.buffers,
        plan.activations,
        plan.total,
    )
    return (
        str(plan.stage),
        *(f"{size / GIB:.2f}" for size in sizes),
        "fits" if plan.fits else "does not fit",
    )


def _largest(plan: Plan) -> str:
    names = {0: "none", 1: "every layer"}
    rows = [("activation checkpointing", *(f"stage {stage.stage}" for stage in plan.stages))]
    for every in plan.stages[0].largest:
        label = names.get(every, f"every {every}. layer")
        rows.append((label, *(str(stage.largest[every] or "-") for stage in plan.stages)))
    return "\n".join(["Largest micro-batch that fits and divides each GPU's share", *_aligned(rows)])


def _advice(plan: Plan) -> str:
    if plan.recommended_stage is None:
        return (
            "Not even one sample fits: take GPUs with more memory, more of them, or offload "
            "(ds_configs/zero3_offload.json)"
        )
    splits = ", ".join(f"{micro} x {times}" for micro, times in list(plan.splits.items())[-8:])
    recomputing = f", train.activation_checkpointing={plan.checkpointing}" if plan.checkpointing else ""
    total = plan.micro_batch * plan.accumulation * plan.cluster.ranks
    return _pairs(
        [
            (
                "recommended",
                f"ds_configs/zero{plan.recommended_stage}.json, train.micro_batch_size={plan.micro_batch}{recomputing}",
            ),
            ("batch", f"{total} = {plan.micro_batch} x {plan.accumulation} x {plan.cluster.ranks} ranks"),
            ("other splits", f"micro-batch x accumulation: {splits}"),
            ("per sample", f"{plan.flops_per_sample / 1e9:,.0f} GFLOP, forward and backward"),
            ("speed", f"{plan.samples_per_s:,.0f} samples/s, if {plan.mfu:.0%} of the GPUs' peak is reached"),
            ("loader", f"{plan.decodes_per_s_per_node:,.0f} pictures decoded per second and node"),
            (
                "checkpoints",
                f"{plan.checkpoint_bytes / GIB:.2f} GiB each, {plan.disk_bytes / GIB:.1f} GiB of disk for those "
                "that are kept and the next",
            ),
            (
                "duration",
                f"{plan.hours:,.1f} hours, {plan.gpu_hours:,.0f} GPU-hours, without evaluation and stops",
            ),
        ]
    )


def _pairs(rows: list[tuple[str, str]]) -> str:
    return "\n".join(f"{label:<13} {text}" for label, text in rows)


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
