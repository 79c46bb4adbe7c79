# Smaller, and with three times the learning rate for the projection.
arm, wte, tie_weights = "kronecker_s01_lr3", "kronecker", False
wte_init_rms, wte_lr_mult = 0.1, 3.0
