# The codec plus a rank-4 residual of each token's own: 86% fewer input parameters at width 64, 90% at 256.
arm, wte, tie_weights = "kronecker_rank4", "kronecker", False
wte_rank = 4
