"""Token shards on disk, the tokenizers that made them, and the loader that reads them in a fixed order."""


class DataError(ValueError):
    """Something is wrong with data on or on its way to the disk; it says what, where and what to do."""
