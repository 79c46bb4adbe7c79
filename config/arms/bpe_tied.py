# The paper's baseline: a learned table, and the head tied to it.
arm, wte, tie_weights = "bpe_tied", "stock", True
