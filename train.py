"""Train a GPT-2 whose input embedding is a switch. Read it from top to bottom.

python train.py config/demo.py config/arms/kronecker.py --seed=1338
torchrun --standalone --nproc_per_node=8 train.py config/gpt2_124m_fineweb_edu.py config/arms/kronecker.py
python train.py --help
"""

import dataclasses
import json
import math
import sys
from pathlib import Path

import configurator
from data import console

if __name__ == "__main__":  # before torch, whose import takes seconds: --help, a mistyped key and Ctrl-C
    console.early(configurator.load, sys.argv[1:], quiet=True)

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import kronecker
from data import DataError
from data.identity import check_fits
from data.loader import TrainBatches, ValWindows, check_ids, prefetch, token_counts
from data.meta import describe
from data.tokenizers import load_tokenizer
from engine import checkpoint, contract, costs, evaluation, flops, metrics, plan, pretrained, runs, settings
from engine import ranks as engine_ranks
from engine.errors import RunError, sentences
from engine.metrics import Progress
from engine.step import GuardedStep, dropout_seed, make_optimizer
from kronecker.additions import row_entropy_penalty
from kronecker.audit import audit, audit_line
from model import GPT, GPTConfig


def learning_rate(config, step: int) -> float:
    """Linear warm-up, then a cosine down to min_lr at lr_decay_iters; a constant without decay_lr."""
    if not config.decay_lr:
        return config.learning_rate
    if step < config.warmup_iters:
        return config.learning_rate * (step + 1) / (config.warmup_iters + 1)
    end = config.lr_decay_iters or config.max_iters
    if step >= end:
        return config.min_lr
    done = (step - config.warmup_iters) / (end - config.warmup_iters)
    return config.min_lr + 0.5 * (1 + math.cos(math.pi * done)) * (config.learning_rate - config.min_lr)


def main(config) -> None:
    # ---- where we run, and with how many
    ranks = engine_ranks.start(config.device)
    device, world, print0 = ranks.device, ranks.world, ranks.print0
    stop_signal = engine_ranks.StopSignal()
    ranks.agree(contract.agreed_keys(dataclasses.asdict(config)), "start all ranks with the same command")
    rows, micro_batch = plan.batch_split(config, world)
    micro_steps = rows // (micro_batch * world)

    # ---- what will be trained on what, and what it will cost
    config, shape, data_dir, meta, weights = outline(config, device, ranks.on_master)
    tokens_per_step = rows * config.block_size
    autocast = engine_ranks.set_arithmetic(config, device)
    params = count_parameters(shape)
    flops_token = flops.flops_per_token(shape)
    print0(plan.describe(config, shape, params, flops_token, world, config.dtype != "float32", device.type))
    if config.dry_run:
        if not data_dir.is_dir() and "vocab_size" not in config.given:
            print0(f"note        {data_dir} is not there yet: GPT-2's vocabulary is assumed")
        work = costs.work_of(config, rows, params, flops_token)
        print0(costs.describe_run(work, params, device, config.price_per_gpu_hour))
        print0(*(f"{k} = {v!r}" for k, v in dataclasses.asdict(config).items()), sep="\n")
        return

    # ---- data: batches are a pure function of (seed, step)
    train = TrainBatches(data_dir, config.block_size, rows, config.seed)
    val = ValWindows(data_dir, config.block_size, config.eval_tokens, config.eval_skip_tokens)
    meta = describe(data_dir, config.vocab_size, check_ids(data_dir, config.vocab_size))
    tokenizer, byte_buffers, codec = read_tokenizer(config, meta, data_dir, print0)
    if weights is not None and tokenizer is not None:
        pretrained.check_tokenizer(config.init_from, tokenizer, config.vocab_size, data_dir)
    byte_lengths = np.zeros(0) if tokenizer is None else tokenizer.byte_lengths()
    n_tokens, n_windows = train.n_tokens, val.n_windows
    print0(f"data        {n_tokens:,} training tokens, {n_windows:,} validation windows in {data_dir}")

    # ---- the model, drawn from the seed or read from elsewhere
    try:
        model = GPT(shape, byte_buffers, seed=config.seed)
    except ValueError as e:  # such as bytes beyond char_dim
        raise RunError(str(e)) from None
    if weights is not None:
        pretrained.load(model, weights, config.init_from)

    # ---- who this run is: what must be equal in runs that are compared, and what made it
    facts = runs.data_facts(data_dir, train, val, config.max_iters)
    facts |= {"body_sha256": model.body_sha256(), "params": params, "codec": codec, "world": world}
    facts |= {"flops_per_token": flops_token, "tokens_per_step": tokens_per_step, "micro_batch": micro_batch}
    run = runs.identity(config, facts, device)
    if config.check_only:
        print0(json.dumps(run | {"config": dataclasses.asdict(config)}))
        console.output_arrived()
        engine_ranks.stop()
        return
    ours = {"dtype": config.dtype} | {k: run[k] for k in ("body_sha256", "data_sha256", "val_sha256")}
    ranks.agree(ours, f"give every node the same code, and the same shards in {data_dir}")

    # ---- the run's folder: go on with what is there, or begin
    out_dir = Path(config.out_dir)
    held = []  # the folder's lock, until the process ends
    ranks.on_master(lambda: held.append(runs.lock(out_dir)))
    resume_from = ranks.on_master(runs.resumable, out_dir, config, run)
    model.to(device)
    optimizer = make_optimizer(model, config, device.type)
    state, evaluated = {"step": 0, "best_val": None}, False
    if resume_from is not None:
        # rank 0 reads and tells the others, so that only its machine needs the folder
        state = checkpoint.restore(model, optimizer, ranks.on_master(checkpoint.load, resume_from))
        print0(f"resuming    at step {state['step']:,} from {resume_from}")
        evaluated = ranks.on_master(metrics.is_evaluated, out_dir, state["step"])
        if evaluated and state["step"] == config.max_iters and not config.eval_only:
            print0("finished    already; nothing to do")
            engine_ranks.stop()
            return
    first, log = state["step"], None
    looks_only = config.eval_only and resume_from is not None  # leaves the run's record as it is
    if not looks_only:
        ranks.on_master(runs.begin, out_dir, config, run, first, meta, tokenizer)
        log = metrics.Metrics(out_dir, first, config.tracker) if ranks.master else None

    # ---- the raw model is evaluated and saved; the compiled, wrapped one only trains
    wrapped = torch.compile(model, mode=config.compile_mode) if config.compile else model
    if world > 1:
        wrapped = DistributedDataParallel(wrapped, [device.index] if device.type == "cuda" else None)
    model.train()
    guard = GuardedStep(model, optimizer, config, device, state)
    progress = Progress(first, config.max_iters, tokens_per_step, flops_token, device, world)

    def batches():
        for step in range(first, config.max_iters):
            for micro in range(micro_steps):
                lo = (micro * world + ranks.rank) * micro_batch
                x, y = train.rows(step, lo, lo + micro_batch)
                if not config.compile:
                    model.plan_ahead(x)
                yield x, y

    def save(step: int) -> None:
        now = guard.state_dict() | {"best_val": state["best_val"]}
        ranks.on_master(runs.save, out_dir, step, model, optimizer, now, log, config.keep)

    # ---- the loop
    ckpt_interval = config.ckpt_interval or config.eval_interval
    if world > 1 and first < config.max_iters and not config.eval_only:
        # DDP orders its buckets anew after its first backward pass, and so its sums: done here, once and for nothing, a
        # run that was resumed sums as one that was not
        x, y = (
            t.to(device) for t in train.rows(first, ranks.rank * micro_batch, (ranks.rank + 1) * micro_batch)
        )
        with autocast:
            _, loss = wrapped(x, y)
        loss.backward()
        optimizer.zero_grad(set_to_none=True)
    incoming = prefetch(batches(), device)
    ranks.any(False)  # all have started: nobody's start counts as another's step

    for step in range(first, config.max_iters + 1):
        last = step == config.max_iters
        stops = progress.timed(ranks.any, stop_signal.number is not None)
        saved = step == first and resume_from is not None
        again = step == first and evaluated  # a resume drops that row, and with it the best loss so far
        evaluates = again or step % config.eval_interval == 0 or last or config.eval_only
        due = ckpt_interval > 0 and step > first and step % ckpt_interval == 0
        if evaluates or due or stops:
            progress.settle()
        due = due and guard.streak == 0  # while steps are skipped, the weights may be what is wrong
        if (due or stops or (last and ckpt_interval > 0 and step > first)) and not saved:
            save(step)  # before the evaluation, which may be long
            saved = True
        if stops:
            print0(f"stopped by {stop_signal.name} at step {step:,}; saved. ", end="")
            print0("The same command with --init_from=auto goes on from here.")
            stop_signal.leave()
        if evaluates:
            # at the end also by the frequency of the token read and of the token predicted
            counts = token_counts(data_dir, config.vocab_size) if last or config.eval_only else None
            figures = evaluation.evaluate(model, val, byte_lengths, micro_batch, ranks, autocast, counts)
            row = {"iter": step, "tokens": step * tokens_per_step} | figures | model.wte_norms()
            print0(evaluation.line(row))
            best = math.inf if state["best_val"] is None else state["best_val"]
            may_be_best = config.keep_best and step > 0 and not looks_only
            if may_be_best and row["val/loss"] < best:  # a NaN is never best
                if not saved:
                    save(step)  # with the best loss before this one: a resume here evaluates again
                state["best_val"] = row["val/loss"]
                ranks.on_master(checkpoint.keep_as_best, out_dir, step, config.keep)
            if log:
                log.log(row)  # last: the row of max_iters says that the run is finished
        if last or config.eval_only:
            break

        progress.begin_step()
        lr = learning_rate(config, step)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_mult"]
        loss_sum = torch.zeros((), device=device)
        for micro in range(micro_steps):
            x, y = next(incoming)
            if config.dropout:
                torch.manual_seed(dropout_seed(config.seed, step, micro * world + ranks.rank))
            if world > 1:  # one gradient sync a step; the flag counts when the forward pass runs
                wrapped.require_backward_grad_sync = micro == micro_steps - 1
            with autocast:
                _, loss = wrapped(x, y)
            loss_sum += loss.detach()
            if config.wte_entropy:  # steers, but is no part of the reported loss
                projection = model.transformer.wte.projection.weight
                loss = loss + config.wte_entropy * row_entropy_penalty(projection)
            (loss * (guard.loss_scale / micro_steps)).backward()
        loss_mean = loss_sum / (micro_steps * world)
        if world > 1:
            dist.all_reduce(loss_mean)
        norm = guard.step(loss_mean)

        progress.end_step()
        if step % config.log_interval == 0 or step + 1 == config.max_iters:
            progress.settle()  # the figures wait for the device
            row = {"iter": step, "tokens": step * tokens_per_step, "train/loss": loss_mean.item(), "lr": lr}
            row |= {"grad_norm": norm.item(), "skipped": int(guard.skipped)} | progress.figures()
            if log:
                log.log(row)
            print0(progress.line(row), flush=True)
            if (streak := int(guard.streak)) >= config.max_skipped:
                bad = {s: train.window_ids(s).tolist() for s in range(step + 1 - streak, step + 1)}
                raise RunError(ranks.on_master(runs.give_up, out_dir, bad))

    if log:
        runs.check_still_there(out_dir, step)
        log.close()
    engine_ranks.stop()
    if not math.isfinite(row["val/loss"]):
        raise RunError(
            f"the validation loss at step {step:,} is not finite: the run diverged; lower learning_rate"
        )


def outline(config, device, on_master=lambda work, *args: work(*args)) -> tuple:
    """(configuration with nothing left open, model's shape, data_dir, its description, pretrained weights or None).

    A dry run needs no more than this, and no more than descriptions for it.
    """
    data_dir = Path(config.data_dir or Path(__file__).parent / "data" / config.dataset)
    weights, decided = None, {}
    if config.init_from in ("resume", "auto"):
        kept, where = on_master(runs.recorded, config, pretrained.DECIDED), f"in {config.out_dir}/config.json"
        decided = {k: configurator.convert(configurator.KEYS, k, v, where) for k, v in kept.items()}
    elif config.init_from != "scratch":
        weights, decided = pretrained.read(config.init_from, config.given, with_weights=not config.dry_run)
    meta = describe(data_dir, decided.get("vocab_size", config.vocab_size))
    config, shape = settings.resolve(config, device, meta, decided, GPTConfig)
    check_fits(data_dir, meta, config.vocab_size)
    return config, shape, data_dir, meta, weights


def read_tokenizer(config, meta: dict, data_dir: Path, print0) -> tuple:
    """(tokenizer, byte buffers of the codec, audit of the codec), each None where the run does without it."""
    try:
        tokenizer = load_tokenizer(meta["tokenizer"], base_dir=data_dir)
    except DataError as e:
        if config.wte == "kronecker" or meta["tokenizer"] not in ("gpt2", None):
            raise
        print0(f"note: {e}; bits per byte are left out")  # a learned table trains without it
        return None, None, None
    if tokenizer.n_vocab > config.vocab_size:
        sizes = f"the tokenizer {tokenizer.name} has {tokenizer.n_vocab:,} ids, vocab_size is {config.vocab_size:,}"
        raise RunError(
            f"{data_dir} does not fit the model: {sizes}; prepare the data again, or raise vocab_size"
        )
    if config.wte != "kronecker":
        return tokenizer, None, None
    buffers = kronecker.build_byte_buffer(tokenizer.backend, config.pos_dim, config.byte_extraction)
    codec = audit(tokenizer.backend, config.pos_dim, config.byte_extraction, config.n_embd, config.char_dim)
    print0(audit_line(codec))
    return tokenizer, buffers, codec


def count_parameters(shape: GPTConfig) -> dict[str, int]:
    """The model's parameters by part, without making it."""
    no_bytes = torch.zeros(1, shape.pos_dim, dtype=torch.uint8), torch.zeros(1, dtype=torch.int16)
    try:
        with torch.device("meta"):
            return GPT(shape, no_bytes).count_parameters()
    except ValueError as e:  # keys that do not go together
        raise RunError(str(e)) from None


def cli(argv: list[str]) -> None:
    config = configurator.load(argv)
    with sentences(lambda: plan.memory_advice(config, engine_ranks.world_size())):
        main(config)


if __name__ == "__main__":
    try:
        cli(sys.argv[1:])
    except SystemExit as end:
        engine_ranks.leave(end)
