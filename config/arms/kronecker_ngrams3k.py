# The codec plus a bag of hashed byte 2- and 3-grams in 3,072 buckets: 86% fewer input parameters than a table.
arm, wte, tie_weights = "kronecker_ngrams3k", "kronecker", False
wte_ngrams = 3072
