# Smallest rung of the ladder: GPT-2's vocabulary on a body that a laptop's thread trains on 1M tokens in minutes.
#   python scripts/matched.py config/experiments/ladder.py
# 0.1M body and 3.2M head parameters, 20M FLOPs a token.
dataset, out_dir = "edu_mix", "out/ladder/one"

n_layer, n_head, n_embd, block_size = 2, 2, 64, 128
vocab_size = 50304

batch_size, global_batch_size = 32, 32  # 4,096 tokens a step
log_interval, keep, keep_best = 16, 1, False
dtype, compile = "bfloat16", False  # stated, so that they are the same on every machine
