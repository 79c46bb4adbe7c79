# The tie that the reference calls impossible: the head is the table that codec and projection induce.
arm, wte, tie_weights = "kronecker_tied", "kronecker", True
