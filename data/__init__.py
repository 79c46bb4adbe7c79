"""Token shards on disk, the tokenizers that made them, and the loader that reads them back in a fixed order."""


class DataError(ValueError):
    """Something is wrong with data on disk or on its way there; the message says what, where and what to do."""
