# Second rung of the ladder: 0.8M body and 6.4M head parameters, 45M FLOPs a token.
#   python scripts/matched.py config/experiments/ladder.py
dataset = "edu_mix"
out_dir = "out/ladder/one"

n_layer, n_head, n_embd, block_size = 4, 4, 128, 256
vocab_size = 50304
bias = False
dropout = 0.0
pos_dim = 16

batch_size, global_batch_size = 16, 16  # 4,096 tokens a step
weight_decay, beta1, beta2, grad_clip = 1e-1, 0.9, 0.95, 1.0
log_interval, keep, keep_best = 16, 1, False
dtype = "bfloat16"
compile = False
