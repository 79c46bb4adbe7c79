# The paper's comparison at reduced scale: GPT-2 124M on 105M tokens, short enough for one GPU and nine minutes a run.
#   python scripts/gpu/recipe.py train --arms kronecker --seeds 1337      (results/124m/README.md says how the data is made)
# Cost of one run: 855 MFLOP a token x 1.049e8 tokens = 8.96e16 FLOPs; at 45% of an H200's 989 TFLOP/s, 201 s.
# The data are text of your own, with held-out text for validation:
#   python data/fineweb_edu/prepare.py --input TEXT.jsonl.xz ... --val-input HELD_OUT.jsonl.xz --out-dir data/edu_mix
# What is not named here is at its default, and so as in config/gpt2_124m_fineweb_edu.py.
dataset = "edu_mix"
out_dir = "out/gpt2_124m_short/one"

n_layer, n_head, n_embd, block_size = 12, 12, 768, 1024
vocab_size = 50304

# 64 sequences x 1,024 = 65,536 tokens a step: at so few tokens a run gains more from steps than from large batches.
batch_size = 64
global_batch_size = 64
max_iters = 1600

learning_rate, min_lr = 6e-4, 6e-5
warmup_iters = 100

eval_interval, eval_tokens, log_interval = 160, 327_680, 20
ckpt_interval, keep, keep_best = 1600, 1, False  # one checkpoint, at the end: writing 2 GB takes seconds
dtype = "bfloat16"
