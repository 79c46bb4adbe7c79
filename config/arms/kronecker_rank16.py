# kronecker_s01_lr3 plus a rank-16 residual of each token's own: 90% fewer at 124M.
arm, wte, tie_weights = "kronecker_rank16", "kronecker", False
wte_init_rms, wte_lr_mult, wte_rank = 0.1, 3.0, 16
