# The codec, with the tokens' bytes dealt out anew among tokens of equal length: the same kind of code, without meaning.
arm, wte, tie_weights = "kronecker_permuted", "kronecker", False
wte_permute_seed = 1
