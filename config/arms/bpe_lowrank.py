# A factorised table (ALBERT, arXiv 1909.11942) of the codec's number of parameters: the plain way to save as much.
arm, wte, tie_weights = "bpe_lowrank", "lowrank", False
