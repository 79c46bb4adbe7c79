# The control that the paper lacks: a learned table, and a head of its own.
arm, wte, tie_weights = "bpe_untied", "stock", False
