# Third rung of the ladder: 4.7M body and 12.9M head parameters, 110M FLOPs a token.
#   python scripts/matched.py config/experiments/ladder.py
dataset, out_dir = "edu_mix", "out/ladder/one"

n_layer, n_head, n_embd, block_size = 6, 8, 256, 256
vocab_size = 50304

batch_size, global_batch_size = 16, 16  # 4,096 tokens a step
log_interval, keep, keep_best = 16, 1, False
dtype, compile = "bfloat16", False
