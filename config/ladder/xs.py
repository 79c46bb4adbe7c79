# Smallest rung of the ladder: GPT-2's vocabulary on a body that a laptop's thread trains on 1M tokens in minutes.
#   python scripts/matched.py config/experiments/ladder.py
# 0.1M body and 3.2M head parameters, 20M FLOPs a token.
dataset = "edu_mix"
out_dir = "out/ladder/one"

n_layer, n_head, n_embd, block_size = 2, 2, 64, 128
vocab_size = 50304
bias = False
dropout = 0.0
pos_dim = 16  # D = 256 * 16 = 4096

batch_size, global_batch_size = 32, 32  # 4,096 tokens a step
weight_decay, beta1, beta2, grad_clip = 1e-1, 0.9, 0.95, 1.0
log_interval, keep, keep_best = 16, 1, False
dtype = "bfloat16"  # of the matmuls; stated, so that it is the same on every machine
compile = False
