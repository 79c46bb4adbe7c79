# The paper's embedding at a tenth of its size: RMS 0.1 beside position embeddings of 0.02.
arm, wte, tie_weights = "kronecker_s01", "kronecker", False
wte_init_rms = 0.1
