# The paper's run: GPT-2 124M on 2.5B tokens of FineWeb-Edu (arXiv 2605.29459, section 6).
#   python data/fineweb_edu/prepare.py      (or --pretokenized kjj0/finewebedu10B-gpt2)
#   torchrun --standalone --nproc_per_node=8 train.py config/gpt2_124m_fineweb_edu.py config/arms/kronecker.py
# Cost of one run: 855 MFLOP a token x 2.5e9 tokens = 2.14e18 FLOPs. At 40% of an H100's 989 TFLOP/s that is
# 1.5 GPU-hours; at 30% of an A100's 312, 6.4. Three arms with three seeds: nine times as much.
dataset = "fineweb_edu"
out_dir = "out/gpt2_124m/one"

n_layer, n_head, n_embd, block_size = 12, 12, 768, 1024
vocab_size = 50304
bias = False
dropout = 0.0
pos_dim = 16  # D = 256 * 16 = 4096

# 528 sequences x 1,024 = 540,672 tokens a step, 4,623 steps = 2.5B tokens. batch_size is what one GPU takes at
# a time; 22 x 8 GPUs x 3 = 22 x 1 GPU x 24 = 528.
batch_size = 22
global_batch_size = 528
max_iters = 4623

learning_rate, min_lr = 6e-4, 6e-5
warmup_iters = 200
weight_decay, beta1, beta2, grad_clip = 1e-1, 0.9, 0.95, 1.0

eval_interval, log_interval = 250, 10
eval_tokens = 10_485_760
# All ranks wait for a checkpoint of 2 GB; on eight GPUs one at every evaluation would be a tenth of the time or more.
ckpt_interval, keep_best = 1000, False
