# The paper's method: a fixed byte codec and one learned projection, and a head of its own.
arm, wte, tie_weights = "kronecker", "kronecker", False
