"""What a run will be and need, said before it starts."""

from engine.errors import RunError
from engine.flops import CONVENTION, memory_estimate


def global_batch(config) -> int:
    """Sequences in one optimiser step, over all ranks."""
    return config.global_batch_size or config.batch_size * config.gradient_accumulation_steps


def batch_split(config, world: int) -> tuple[int, int]:
    """(sequences a step over all ranks, sequences that a rank takes at a time).

    The latter is the largest divisor of a rank's share that batch_size allows, so that every number of ranks that
    divides the global batch will do; another one is refused with those nearest to it.
    """
    rows = global_batch(config)
    if rows % world:
        numbers = [w for w in range(1, min(rows, 4 * world) + 1) if rows % w == 0]
        near = [max(w for w in numbers if w < world), *[w for w in numbers if w > world][:1]]
        batches = [r for r in (rows // world * world, rows // world * world + world) if r]
        raise RunError(
            f"a global batch of {rows} sequences does not divide among {world} ranks: take "
            f"{' or '.join(map(str, near))} rank{'s' * (near != [1])}, or --global_batch_size="
            f"{' or '.join(map(str, batches))}"
        )
    return rows, largest_divisor(rows // world, config.batch_size)


def largest_divisor(n: int, limit: int) -> int:
    return next(d for d in range(min(n, limit), 0, -1) if n % d == 0)


def describe(config, model_config, params: dict, flops_token, world: int, low_precision, device_type) -> str:
    """The plan as text: parameters by part, FLOPs, tokens, memory."""
    rows, micro_batch = batch_split(config, world)
    tokens_step = rows * config.block_size
    saved = 1 - params["input"] / params["stock_table"]
    memory = rank_memory(config, model_config, params, world, low_precision, device_type)
    total = sum(memory.values())
    flops = flops_token * tokens_step * config.max_iters
    compared = f"{saved:.1%} fewer than a learned table" if saved > 0 else f"{1 - saved:.2f}x a learned table"
    compared = "a learned table" if config.wte == "stock" else compared
    allowed = f" (batch_size allows {config.batch_size})" if micro_batch < config.batch_size else ""
    lines = [
        f"arm         {config.arm}, seed {config.seed}",
        f"input side  {params['input']:>13,} parameters, {compared}",
        f"body        {params['body']:>13,}",
        f"head        {params['head']:>13,}" + (" (tied)" if config.tie_weights else ""),
        f"all         {params['total']:>13,}",
        f"a step      {rows:,} sequences of {config.block_size:,} = {tokens_step:,} tokens on {world} rank{'s' * (world > 1)}, "
        f"{micro_batch} at a time{allowed}",
        f"the run     {config.max_iters:,} steps, {tokens_step * config.max_iters:,} tokens, {flops:.3g} FLOPs",
        f"rate        {schedule(config)}",
        f"FLOPs       {flops_token:,} a token ({CONVENTION})",
        f"memory      about {total:.2f} GB a rank: {memory['state']:.2f} weights, gradients and moments, "
        f"{memory['activations']:.2f} activations, {memory['logits']:.2f} logits",
    ]
    return "\n".join(lines)


def schedule(config) -> str:
    """The learning rate over the run, and what is odd about it."""
    top, warm, end = config.learning_rate, config.warmup_iters, config.lr_decay_iters or config.max_iters
    if not config.decay_lr:
        return f"{top:g} throughout"
    says = f"up to {top:g} in {warm:,} steps, then down to {config.min_lr:g} at step {end:,}"
    if warm >= config.max_iters:
        return f"{says}; it still rises when the run ends: lower warmup_iters"
    return says + "; it falls at once, without a decay: raise lr_decay_iters" * (end <= warm)


def rank_memory(config, model_config, params: dict, world: int, low_precision, device_type) -> dict:
    """GB that one of so many ranks needs, by part."""
    micro_batch = batch_split(config, world)[1]
    compiled = config.compile is not False
    return memory_estimate(model_config, params, micro_batch, low_precision, device_type, world, compiled)


def memory_advice(config, world: int) -> str:
    """Which knob to turn, and by how much, so that less memory is needed and the run stays the same."""
    rows, micro_batch = batch_split(config, world)
    if micro_batch > 1:
        smaller = largest_divisor(rows // world, micro_batch - 1)
        return (
            f"--batch_size={smaller} instead of {micro_batch} takes about {smaller / micro_batch:.0%} of the "
            f"activations' memory and gives the same global batch of {rows} (--global_batch_size={rows})"
        )
    return f"batch_size is as small as it gets: lower block_size {config.block_size}, use more ranks, or a smaller model"
