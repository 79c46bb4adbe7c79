"""What a run will be and need, said before it starts."""

from engine.errors import RunError
from engine.flops import CONVENTION, memory_estimate


def batch_split(config, world: int) -> tuple[int, int]:
    """(sequences a step over all ranks, micro-steps of one rank); a split that does not come out even is refused."""
    for name in ("max_iters", "eval_interval", "log_interval", "keep", "max_skipped"):
        if getattr(config, name) < 1:
            raise RunError(f"{name} is {getattr(config, name)}, but it must be at least 1")
    rows = config.global_batch_size or config.batch_size * config.gradient_accumulation_steps
    if config.batch_size < 1 or rows < 1:
        raise RunError(f"batch_size {config.batch_size} and a global batch of {rows} must both be at least 1")
    if rows % (config.batch_size * world):
        together = config.batch_size * world
        near = sorted({max(1, rows // together) * together, (rows // together + 1) * together})
        advice = f"take a global batch of {' or '.join(map(str, near))}"
        if rows % world == 0:
            sizes = [b for b in range(1, rows // world + 1) if rows // world % b == 0]
            advice = f"take a batch_size of {', '.join(map(str, sizes))}, or {advice[5:]}"
        raise RunError(
            f"a global batch of {rows} sequences does not divide into micro-batches of {config.batch_size} "
            f"on {world} rank{'s' * (world > 1)}: {advice}"
        )
    return rows, rows // (config.batch_size * world)


def describe(
    config, model_config, params: dict, flops_token: int, rows: int, world: int, low_precision: bool
) -> str:
    """The plan as text: parameters by part, FLOPs, tokens, memory."""
    tokens_step = rows * config.block_size
    saved = 1 - params["input"] / params["stock_table"]
    memory = memory_estimate(model_config, params, config.batch_size, low_precision)
    total = sum(memory.values())
    flops = flops_token * tokens_step * config.max_iters
    compared = f"{saved:.1%} fewer than a learned table" if saved > 0 else "a learned table"
    lines = [
        f"arm         {config.arm}, seed {config.seed}",
        f"input side  {params['input']:>13,} parameters, {compared}",
        f"body        {params['body']:>13,}",
        f"head        {params['head']:>13,}" + (" (tied)" if config.tie_weights else ""),
        f"all         {params['total']:>13,}",
        f"a step      {rows:,} sequences of {config.block_size:,} = {tokens_step:,} tokens on {world} rank{'s' * (world > 1)}, "
        f"{config.batch_size} sequences at a time",
        f"the run     {config.max_iters:,} steps, {tokens_step * config.max_iters:,} tokens, {flops:.3g} FLOPs",
        f"FLOPs       {flops_token:,} a token ({CONVENTION})",
        f"memory      about {total:.2f} GB a rank: {memory['state']:.2f} weights, gradients and moments, "
        f"{memory['activations']:.2f} activations, {memory['logits']:.2f} logits",
    ]
    return "\n".join(lines)


def memory_advice(config, rows: int, world: int) -> str:
    """Which knob to turn, and by how much, so that less memory is needed and the run stays the same."""
    smaller = [b for b in range(1, config.batch_size) if rows % (b * world) == 0]
    if smaller:
        half = max([b for b in smaller if b <= max(1, config.batch_size // 2)] or [smaller[0]])
        return (
            f"--batch_size={half} instead of {config.batch_size} takes about {half / config.batch_size:.0%} of the "
            f"activations' memory and gives the same global batch of {rows} (--global_batch_size={rows})"
        )
    return f"batch_size is as small as it gets: lower block_size {config.block_size}, use more ranks, or a smaller model"
