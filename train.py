"""Train a GPT-2 whose input embedding is a switch. Read it from top to bottom.

python train.py config/demo.py config/arms/kronecker.py --seed=1338
torchrun --standalone --nproc_per_node=8 train.py config/gpt2_124m_fineweb_edu.py config/arms/kronecker.py
python train.py --help
"""

import dataclasses
import hashlib
import json
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import configurator
import kronecker
from data import DataError
from data.loader import TrainBatches, ValWindows, check_ids, fingerprint, prefetch, token_counts
from data.meta import describe
from data.tokenizers import load_tokenizer
from engine import checkpoint, contract, evaluation, flops, metrics, plan, pretrained, runs
from engine import ranks as engine_ranks
from engine.errors import RunError, sentences
from kronecker.audit import audit, audit_line
from kronecker.regularizer import row_entropy_penalty
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


def make_optimizer(model, config, device_type: str) -> torch.optim.AdamW:
    """AdamW; matrices decay, vectors do not; input side and head may have a learning rate and a decay of their own.

    The input side is `wte`, which a tied head shares.
    """
    groups = {}
    for name, p in model.named_parameters():
        mult, decay = 1.0, config.weight_decay
        if name.startswith("transformer.wte."):
            mult = config.wte_lr_mult
            decay = decay if config.wte_weight_decay == -1 else config.wte_weight_decay
        elif name.startswith("lm_head."):
            mult = config.head_lr_mult
        groups.setdefault((mult, decay if p.dim() >= 2 else 0.0), []).append(p)
    return torch.optim.AdamW(
        [{"params": ps, "lr_mult": mult, "weight_decay": decay} for (mult, decay), ps in groups.items()],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        fused=device_type in ("cuda", "cpu"),
    )


def main(config) -> None:
    # ---- where we run, and with how many
    ranks = engine_ranks.start(config.device)
    device, world = ranks.device, ranks.world
    say = print if ranks.master else lambda *args, **kwargs: None
    wishes = engine_ranks.Signals()
    config.dtype, autocast = engine_ranks.number_format(config.dtype, device)
    engine_ranks.choose_attention(config.attention, config.dtype, config.deterministic, device)
    config.arm = (
        config.arm
        or f"{'bpe' if config.wte == 'stock' else config.wte}_{'tied' if config.tie_weights else 'untied'}"
    )
    if config.compile is None:
        config.compile = device.type == "cuda"
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    torch.set_float32_matmul_precision("high")  # float32 matmuls on CUDA may use TF32
    ranks.agree(contract.agreed_keys(dataclasses.asdict(config)), "start all ranks with the same command")
    rows, micro_batch = plan.batch_split(config, world)
    micro_steps = rows // (micro_batch * world)
    tokens_per_step = rows * config.block_size

    # ---- what the data is; a dry run needs no more than its description
    data_dir = Path(config.data_dir or Path(__file__).parent / "data" / config.dataset)
    meta = describe(data_dir, config.vocab_size)
    config.vocab_size = config.vocab_size or -(-meta["vocab_size"] // 64) * 64

    # ---- the model's shape, and what the run will cost
    weights = None
    if config.init_from not in ("scratch", "resume", "auto"):
        weights, shape = pretrained.read(config.init_from, config.given, with_weights=not config.dry_run)
        for name, value in shape.items():  # the file knows better than the defaults
            setattr(config, name, value)
    names = [f.name for f in dataclasses.fields(GPTConfig)]
    try:
        model_config = GPTConfig(**{name: getattr(config, name) for name in names})
        no_bytes = (
            torch.zeros(config.vocab_size, config.pos_dim, dtype=torch.uint8),
            torch.zeros(config.vocab_size).short(),
        )
        with torch.device("meta"):
            params = GPT(model_config, no_bytes).count_parameters()
    except ValueError as e:  # keys that do not go together
        raise RunError(str(e)) from None
    config.wte_init_rms = model_config.wte_init_rms  # what 0 stands for
    if config.tie_weights and config.head_lr_mult != 1:
        raise RunError(
            "head_lr_mult means nothing with tie_weights=True: the head is the input's, see wte_lr_mult"
        )
    if config.wte != "kronecker" and config.wte_entropy:
        raise RunError(f"wte_entropy means nothing with wte={config.wte!r}: it belongs to wte='kronecker'")
    flops_token = flops.flops_per_token(model_config)
    say(plan.describe(config, model_config, params, flops_token, world, config.dtype != "float32"))
    if config.dry_run:
        say("\n".join(f"{k} = {v!r}" for k, v in dataclasses.asdict(config).items()))
        return

    # ---- data: batches are a pure function of (seed, step)
    train = TrainBatches(data_dir, config.block_size, rows, config.seed)
    val = ValWindows(data_dir, config.block_size, config.eval_tokens, config.eval_skip_tokens)
    if meta["vocab_size"] > config.vocab_size:
        raise RunError(
            f"vocab_size {config.vocab_size} is below the tokenizer's {meta['vocab_size']}: leave it at 0"
        )
    check_ids(data_dir, config.vocab_size)
    try:
        tokenizer = load_tokenizer(meta["tokenizer"], base_dir=data_dir)
    except DataError as e:
        if config.wte == "kronecker" or meta["tokenizer"] not in ("gpt2", None):
            raise
        tokenizer = None  # a learned table trains without it
        say(f"note: {e}; bits per byte are left out")
    byte_buffers = codec = None
    if config.wte == "kronecker":
        byte_buffers = kronecker.build_byte_buffer(tokenizer.backend, config.pos_dim, config.byte_extraction)
        codec = audit(
            tokenizer.backend, config.pos_dim, config.byte_extraction, config.n_embd, config.char_dim
        )
        say(audit_line(codec))
    say(f"data        {train.n_tokens:,} training tokens, {val.n_windows:,} validation windows in {data_dir}")

    # ---- the model, drawn from the seed or read from elsewhere
    model = GPT(model_config, byte_buffers, seed=config.seed)
    if weights is not None:
        pretrained.load(model, weights, config.init_from)

    # ---- who this run is: what must be equal in runs that are compared, and what made it
    identity = fingerprint(data_dir)
    ends = [hashlib.sha256(train.rows(s, 0, rows)[0].numpy()).hexdigest() for s in (0, config.max_iters - 1)]
    run = {
        "body_sha256": model.body_sha256(),
        "data_fingerprint": identity,
        "data_sha256": contract.sha256_of([identity, *ends]),
        "val_sha256": val.sha256(),
        "params": params,
        "codec": codec,
        "flops_per_token": flops_token,
        "tokens_per_step": tokens_per_step,
        "world": world,
        "micro_batch": micro_batch,
    }
    run = runs.identity(config, run, device)
    if config.check_only:
        say(json.dumps(run | {"config": dataclasses.asdict(config)}))
        engine_ranks.stop()
        return
    ours = {name: run[name] for name in ("data_sha256", "val_sha256")}
    ranks.agree(ours, f"give every node the same shards in {data_dir}")  # each may have a copy of its own

    # ---- the run's folder: go on with what is there, or begin
    out_dir = Path(config.out_dir)
    held = []  # the folder's lock, until the process ends
    ranks.master_first(lambda: held.append(runs.lock(out_dir)))
    folder = ranks.master_first(lambda: runs.resumable(out_dir, config, run))
    model.to(device)
    optimizer = make_optimizer(model, config, device.type)
    state = {
        "step": 0,
        "best_val": None,
        "skipped": 0,
        "streak": 0,  # bad steps in a row
        "good": 0,  # good steps in a row, for float16's loss scale
        "loss_scale": 65536.0 if config.dtype == "float16" else 1.0,
    }
    if folder is not None:
        # rank 0 reads and tells the others, so that only its machine needs the folder
        weights, moments, state = ranks.same(checkpoint.load(folder) if ranks.master else None)
        model.load_state_dict(weights)
        groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        try:
            optimizer.load_state_dict(moments)
        except ValueError as e:  # weight_decay to or from 0 groups the tensors anew
            raise RunError(
                f"{folder} has moments of other groups of parameters ({e}): keep weight_decay"
            ) from None
        for group, ours in zip(optimizer.param_groups, groups, strict=True):
            group.update(ours)  # the configuration's word counts, not the checkpoint's
        say(f"resuming    at step {state['step']:,} from {folder}")
        if ranks.same(state["step"] >= config.max_iters and metrics.is_finished(out_dir, config.max_iters)):
            say("finished    already; nothing to do")
            engine_ranks.stop()
            return
    ranks.master_first(lambda: runs.begin(out_dir, config, run, folder))
    first = state["step"]
    if ranks.master:
        describe_data(out_dir, meta, tokenizer)
    log = None
    if ranks.master:
        log = metrics.Metrics(out_dir, first, config.tracker)

    # ---- the raw model is evaluated and saved; the compiled, wrapped one only trains
    wrapped = torch.compile(model, mode=config.compile_mode) if config.compile else model
    if world > 1:
        wrapped = DistributedDataParallel(
            wrapped, device_ids=[device.index] if device.type == "cuda" else None
        )
    model.train()

    def batches():
        for step in range(first, config.max_iters):
            for micro in range(micro_steps):
                lo = (micro * world + ranks.rank) * micro_batch
                yield train.rows(step, lo, lo + micro_batch)

    def save(step: int) -> None:
        state.update(skipped=int(skipped), streak=int(streak), good=int(good), loss_scale=float(loss_scale))

        def write() -> None:
            runs.check_still_there(out_dir, step)
            log.sync()  # rows before this step are never made again
            checkpoint.save(out_dir, step, model.state_dict(), optimizer.state_dict(), state)
            checkpoint.prune(out_dir, config.keep)

        ranks.master_first(write)

    # ---- the loop
    peak = flops.peak_flops(device)
    ckpt_interval = config.ckpt_interval or config.eval_interval
    loss_scale = torch.tensor(state["loss_scale"], device=device)
    skipped = torch.tensor(state["skipped"], device=device)
    streak = torch.tensor(state.get("streak", 0), device=device)
    good = torch.tensor(state.get("good", 0), device=device)
    incoming = prefetch(batches(), device)
    byte_lengths = np.zeros(0) if tokenizer is None else tokenizer.byte_lengths()
    clock, timed_steps, started = 0.0, 0, time.perf_counter()

    for step in range(first, config.max_iters + 1):
        last = step == config.max_iters
        wish = ranks.any(wishes.wish is not None)
        saved = step == first and folder is not None
        evaluates = step % config.eval_interval == 0 or last or config.eval_only
        due = ckpt_interval > 0 and step > first and (step % ckpt_interval == 0 or last)
        saves = (due or wish) and not saved
        if evaluates or saves:
            clock += engine_ranks.settle(device)  # what is queued belongs to the steps before
        if saves:
            save(step)  # before the evaluation, which may be long
            saved = True
        if wish:
            say(
                f"stopped by {wishes.wish.name if wishes.wish else 'another rank'} at step {step:,}; saved. ",
                end="",
            )
            say("The same command with --init_from=auto goes on from here.")
            sys.exit(128 + (wishes.wish or 15))
        if evaluates:
            # at the end also by the frequency of the token read and of the token predicted
            counts = token_counts(data_dir, config.vocab_size) if last or config.eval_only else None
            figures = evaluation.evaluate(model, val, byte_lengths, micro_batch, ranks, autocast, counts)
            row = {"iter": step, "tokens": step * tokens_per_step} | figures | model.wte_norms()
            bpb = f", {row['val/bpb']:.4f} bits per byte" if "val/bpb" in row else ""
            say(f"step {step:>6,}  val loss {row['val/loss']:.4f} +- {row['val/sem']:.4f}{bpb}")
            best = math.inf if state["best_val"] is None else state["best_val"]
            if config.keep_best and step > 0 and row["val/loss"] < best:  # a NaN is never best
                if not saved:
                    save(step)  # with the best loss before this one: a resume here evaluates again
                state["best_val"] = row["val/loss"]
                if ranks.master:
                    checkpoint.point(out_dir, "best", f"step_{step:06d}")
                    checkpoint.prune(out_dir, config.keep)  # the best one until now
            if log:
                log.log(row)  # last: the row of max_iters says that the run is finished
        if last or config.eval_only:
            break

        began = time.perf_counter()  # the clock stands still during evaluations and saves
        lr = learning_rate(config, step)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_mult"]
        loss_sum = torch.zeros((), device=device)
        for micro in range(micro_steps):
            x, y = next(incoming)
            if config.dropout:
                # no state to save: masks are a function of (seed, step, rows), so a resume draws the same
                torch.manual_seed(hash((config.seed, step, micro * world + ranks.rank)) & 0x7FFFFFFFFFFFFFFF)
            if world > 1:  # one gradient sync a step; the flag counts when the forward pass runs
                wrapped.require_backward_grad_sync = micro == micro_steps - 1
            with autocast:
                _, loss = wrapped(x, y)
            loss_sum += loss.detach()
            if (
                config.wte_entropy and config.wte == "kronecker"
            ):  # steers, but is no part of the reported loss
                loss = loss + config.wte_entropy * row_entropy_penalty(
                    model.transformer.wte.projection.weight
                )
            (loss * (loss_scale / micro_steps)).backward()
        loss_mean = loss_sum / (micro_steps * world)
        if world > 1:
            dist.all_reduce(loss_mean)

        # A non-finite loss or gradient skips the step on the device itself: AdamW's fused kernel reads
        # found_inf, and divides by grad_scale, which serves for clipping too.
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads) / loss_scale
        bad = ~(norm.isfinite() & loss_mean.isfinite())
        divisor = loss_scale * (norm / config.grad_clip).clamp(min=1) if config.grad_clip else loss_scale
        if device.type in ("cuda", "cpu"):
            optimizer.found_inf, optimizer.grad_scale = bad.float(), divisor.float()
            optimizer.step()
        elif not bad:  # no fused kernel that reads these here
            torch._foreach_div_(grads, divisor)
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        skipped += bad
        streak = (streak + 1) * bad
        if config.dtype == "float16":  # halve the scale on overflow, double it after 2,000 good steps
            good = (good + 1) * ~bad
            loss_scale = torch.where(
                bad, loss_scale / 2, torch.where(good % 2000 == 1999, loss_scale * 2, loss_scale)
            )

        if step % config.log_interval == 0 or step + 1 == config.max_iters:
            row = {"iter": step, "tokens": step * tokens_per_step, "train/loss": loss_mean.item(), "lr": lr}
            row |= {"grad_norm": norm.item(), "skipped": int(skipped)}  # these waited for the device
            clock, timed_steps = clock + time.perf_counter() - began, timed_steps + 1
            row["tok_per_sec"] = timed_steps * tokens_per_step / clock
            if peak:
                row["mfu"] = 100 * row["tok_per_sec"] * flops_token / (peak[0] * world)
            row["mem_gb"] = metrics.memory_gb(device)
            if log:
                log.log(row)
            left = (time.perf_counter() - started) / (step + 1 - first) * (config.max_iters - step - 1)
            mfu = f"  mfu {row['mfu']:.1f}%" if peak else ""
            say(
                f"step {step:>6,}/{config.max_iters:,}  loss {row['train/loss']:.4f}  lr {lr:.2e}  norm {row['grad_norm']:.2f}"
                f"  {row['tok_per_sec']:,.0f} tok/s{mfu}  {int(left) // 60}:{int(left) % 60:02d} left",
                flush=True,
            )
            clock, timed_steps = 0.0, 0
            if int(streak) >= config.max_skipped:
                bad_steps = range(step + 1 - int(streak), step + 1)
                if ranks.master:
                    ids = {s: train.window_ids(s).tolist() for s in bad_steps}
                    runs.write_json(out_dir / "nonfinite.json", {"steps": list(bad_steps), "window_ids": ids})
                raise RunError(
                    f"loss or gradient was not finite in {int(streak)} steps in a row up to step {step}: they were "
                    f"skipped; their windows are in {out_dir / 'nonfinite.json'} and the last good checkpoint is "
                    f"{checkpoint.pointed(out_dir, 'latest') or 'not yet there'}; lower learning_rate or look at the data"
                )
        else:
            clock, timed_steps = clock + time.perf_counter() - began, timed_steps + 1

    if log:
        runs.check_still_there(out_dir, step)
        log.close()
    engine_ranks.stop()


def describe_data(out_dir: Path, meta: dict, tokenizer) -> None:
    """The tokenizer and the data's description beside the weights: a run can be sampled without its data."""
    kept = {k: v for k, v in meta.items() if k != "shards"}
    if tokenizer is not None:
        tokenizer.save(out_dir)
        kept["tokenizer"] = tokenizer.spec
    runs.write_json(out_dir / "data_meta.json", kept)


def cli(argv: list[str]) -> None:
    config = configurator.load(argv)
    world = int(os.environ.get("WORLD_SIZE") or 1)
    with sentences(lambda: plan.memory_advice(config, world)):
        main(config)


if __name__ == "__main__":
    cli(sys.argv[1:])
