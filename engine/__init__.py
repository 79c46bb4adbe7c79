"""What the training loop calls and a reader may skip: plain functions, a file each."""
