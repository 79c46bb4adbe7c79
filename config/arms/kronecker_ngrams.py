# kronecker_s01_lr3 plus a bag of hashed byte 2- and 3-grams: 12.6M more parameters at 124M.
arm, wte, tie_weights = "kronecker_ngrams", "kronecker", False
wte_init_rms, wte_lr_mult, wte_ngrams = 0.1, 3.0, 16384
