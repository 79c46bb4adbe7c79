# Hash embeddings (arXiv 1709.03933) of the codec's number of parameters: the strong way to save as much.
arm, wte, tie_weights = "bpe_hash", "hash", False
