# The paper's comparison with every arm tuned alike, on GPUs: GPT-2 124M, 2.5B tokens of FineWeb-Edu, three seeds.
#   python scripts/matched.py config/experiments/gpt2_124m_tuned.py --dry_run --price_per_gpu_hour=2.5
#   python scripts/matched.py config/experiments/gpt2_124m_tuned.py               a run on each GPU of this node
#   python scripts/compare.py config/experiments/gpt2_124m_tuned.py               the report, from the records alone
# Nothing of it has been run yet. config/experiments/ladder.py explains each name, and what the first tunings missed.
data = "FineWeb-Edu (sample-10BT)"
records = "results/gpt2_124m_tuned/runs"

rungs = {"124m": "config/gpt2_124m_fineweb_edu.py"}

lengths = {
    "250M": {"max_iters": 462, "warmup_iters": 46, "eval_interval": 154},
    "2.5B": {"max_iters": 4623},
}
min_lr_ratio = 0.1

arms = ["bpe_tied", "bpe_untied", "kronecker", "kronecker_permuted"]

# On a tenth of the tokens: the learning rate, then the input side's multiplier and scale, then the rate once more.
tuning = {
    "rung": "124m",
    "length": "250M",
    "seeds": [1],
    "learning_rate": [3e-4, 6e-4, 1.2e-3, 2.4e-3],
    "wte_lr_mult": {"bpe_*": [1 / 4, 1, 4, 16, 64], "kronecker*": [1 / 16, 1 / 4, 1, 4, 16]},
    "wte_init_rms": {"bpe_*": [0.02, 1.0], "kronecker*": [0.1, 1.0]},
    "extend": 2,
    "again": [0.5, 1, 2],
    "keys": {"eval_tokens": 5_242_880},
}
# The learning rate once more at the full length: on the ladder four times the tokens wanted from all of it (the untied
# table) to a quarter (the codec), and a larger body a sixteenth, so an arm whose best stands at the edge goes on.
recheck = [
    {
        "rung": "124m", "length": "2.5B", "seeds": [1], "factors": [0.25, 0.5, 1], "extend": 3,
        "keys": tuning["keys"],
    },
]  # fmt: skip

shared = {"learning_rate": 6e-4}  # the paper's

# Other seeds and validation windows than the tuning's.
final_keys = {"eval_skip_tokens": 5_242_880, "eval_tokens": 10_485_760}
final = [
    {"rung": "124m", "length": "2.5B", "seeds": [1337, 1338, 1339], "settings": ["best"]},
    {
        "rung": "124m", "length": "2.5B", "seeds": [1337, 1338, 1339], "settings": ["shared"],
        "arms": ["bpe_tied", "bpe_untied", "kronecker"],
    },
]  # fmt: skip

# A difference is one when its paired 95% t interval does not hold zero and its mean is at least so many nats.
smallest_difference = 0.005
gap = {"arm": "kronecker", "over": "bpe_untied"}
