# The comparison in miniature, for a laptop: two layers on the docstrings that Python itself carries.
#   python train.py config/demo.py config/arms/kronecker.py --seed=1337
# `make demo` runs three arms with three seeds. 0.93M body and head parameters, 500 steps of 1,024 tokens.
dataset = "pydocs"
out_dir = "out/demo/one"

n_layer, n_head, n_embd, block_size = 2, 4, 128, 128
batch_size = 8
gradient_accumulation_steps = 1
pos_dim = 16

learning_rate, min_lr = 2e-3, 2e-4
warmup_iters, max_iters = 40, 500
eval_interval, eval_tokens, log_interval = 100, 32_768, 10
keep = 1
dtype = "auto"  # bfloat16 matmuls where the processor has them: about twice as fast
compile = False
