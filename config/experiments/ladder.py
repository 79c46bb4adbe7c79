# What the byte codec buys, as a function of size and tokens, at GPT-2's own vocabulary, with every arm tuned alike.
#   python scripts/matched.py config/experiments/ladder.py --dry_run          runs, tokens, FLOPs, hours
#   python scripts/matched.py config/experiments/ladder.py --jobs=2           runs what is not done yet; goes on after any stop
#   python scripts/compare.py config/experiments/ladder.py                    the report, from the records alone
# First written before the first final run; later changes say when and why where they stand. What is below is what the
# report quotes, and runs that differ from it are refused.
data = (
    "edu_mix: encyclopedia, textbooks, web pages (8% FineWeb, 0.4% FineWeb-Edu), government articles, news, non-fiction and "
    "older books. It stands in for FineWeb-Edu between arms; its losses are not comparable with published ones"
)
records = "results/ladder/runs"  # one small JSON a finished run; the runs' own folders are in out/

rungs = {"xs": "config/ladder/xs.py", "s": "config/ladder/s.py", "m": "config/ladder/m.py"}

# Each length has a full schedule of its own: linear warm-up over a tenth (at most 200 steps), cosine to a tenth.
lengths = {
    "1M": {"max_iters": 256, "warmup_iters": 26, "eval_interval": 64},
    "4M": {"max_iters": 1024, "warmup_iters": 102, "eval_interval": 256},
    "16M": {"max_iters": 4096, "warmup_iters": 200, "eval_interval": 1024},
}
min_lr_ratio = 0.1

arms = [
    "bpe_tied", "bpe_untied", "kronecker", "kronecker_permuted", "bpe_lowrank", "bpe_hash", "kronecker_tied",
    "kronecker_ngrams3k", "kronecker_rank4",
]  # fmt: skip

# Tuning: the learning rate at the arm's own defaults, then the input side's multiplier and scale at the best one, then
# the learning rate once more at those. 4 + 2 x 5 - 1 + 2 = 15 runs for every arm. An optimum at the edge of a grid of
# the first two extends it for all arms, at most four times. (Twice, until five arms' losses still fell or lay flat at
# 0.048; changed then, before the first final run.) In the third an arm's grid is extended for that arm alone.
# (The third was added on 2026-11-29, after the final runs at xs, 1M: the table's rate had been chosen at its usual
# multiplier, where the losses are uneven, and at multiplier 64 twice that rate was better by 0.09 nats, more than what
# told it from the best codec arm. Final runs at settings that are no longer the best are kept, in no table.)
tuning = {
    "rung": "xs",
    "length": "1M",
    "seeds": [1],
    "learning_rate": [1.5e-3, 3e-3, 6e-3, 1.2e-2],
    "wte_lr_mult": {"bpe_*": [1, 4, 16, 64, 256], "kronecker*": [1 / 16, 1 / 4, 1, 4, 16]},
    "wte_init_rms": {"bpe_*": [0.02, 1.0], "kronecker*": [0.1, 1.0]},
    "extend": 4,
    "again": [0.5, 1, 2],
    "keys": {"eval_tokens": 65_536, "eval_interval": 128, "ckpt_interval": -1},
}
# On a larger rung and a longer length the learning rate is chosen once more, around the best one of the tuning, the
# rest is kept; places that were not rechecked take the settings of the last one before them that was.
# (xs at 4M was added when one seed of five arms had ended there at the settings of 1M, whose order had turned: the
# best learning rates of 256 steps, up to 0.096 for a whole model, need not be those of 1,024. Grids of a recheck were
# to be extended once; that was dropped then, before its first run, so that no arm waits for another. Factors were
# 0.25, 0.5 and 1 until the first three arms had their best one at an edge; 0.125 and 2 were added then, for every arm,
# before a final run at one of them had ended, but for two of bpe_untied's at 1. At s and 1M factors were 0.5, 1 and 2 until
# the first two arms, bpe_untied and kronecker, had their best one at 0.5; 0.125 and 0.25 were added then, on 2026-11-30,
# for every arm, and since kronecker's then stood at 0.125, the grid of an arm whose best one is at its edge is extended
# there. The only two final runs at s that had begun were stopped early, removed unread, and run anew.)
recheck = [
    {"rung": "xs", "length": "4M", "seeds": [1], "factors": [0.125, 0.25, 0.5, 1, 2], "keys": tuning["keys"]},
    {
        "rung": "s", "length": "1M", "seeds": [1], "factors": [0.125, 0.25, 0.5, 1, 2], "extend": 3,
        "keys": tuning["keys"],
    },
]  # fmt: skip

# What all arms share in the table of one setting, as the paper compares; everything else at the arm's own defaults.
shared = {"learning_rate": 3e-3}

# Final runs, in this order; if time runs out, the last ones are missing. Other seeds and windows than the tuning's.
# (The two arms of the gap ran at 16M, held out of the fit, before the other arms had been tuned and run at 4M.)
final_keys = {"eval_skip_tokens": 65_536, "eval_tokens": 98_304}
final = [
    {"rung": "xs", "length": "1M", "seeds": [11, 12, 13, 14, 15], "settings": ["shared", "best"]},
    {"rung": "xs", "length": "4M", "seeds": [11, 12, 13], "settings": ["best"]},
    {"rung": "s", "length": "1M", "seeds": [11, 12, 13], "settings": ["best"]},
    {"rung": "xs", "length": "16M", "seeds": [11, 12, 13], "settings": ["best"]},
    {"rung": "s", "length": "4M", "seeds": [11, 12, 13], "settings": ["best"]},
    {"rung": "m", "length": "1M", "seeds": [11, 12, 13], "settings": ["best"]},
    {"rung": "xs", "length": "4M", "seeds": [11, 12, 13], "settings": ["shared"]},
]

# A difference between two arms is called one when the paired 95% t interval over seeds does not hold zero and its mean
# is at least this many nats (no smaller one would matter to anyone at these sizes).
smallest_difference = 0.005
# The gap over tokens and size is fitted without this rung and length, and held against it.
held_out = {"rung": "xs", "length": "16M"}
gap = {"arm": "kronecker", "over": "bpe_untied"}
gflops = 90  # one thread with bfloat16 dot products, for the estimate of hours
