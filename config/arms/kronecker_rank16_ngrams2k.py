# Both additions within the same budget: 86% fewer at 124M.
arm, wte, tie_weights = "kronecker_rank16_ngrams2k", "kronecker", False
wte_init_rms, wte_lr_mult, wte_rank, wte_ngrams = 0.1, 3.0, 16, 2048
