"""How many rows are decoded together, and how many tokens are written by default. No torch, for the command line."""

NEW_TOKENS = 128  # default of max_new_tokens
MAX_BATCH = 16
MAX_PLAIN_BATCH = 64  # of plain decoding, which has no trees


def check_batch(size: int, mode: str) -> None:
    """Raises ValueError unless the mode can decode so many rows together."""
    most = MAX_PLAIN_BATCH if mode == "autoregressive" else MAX_BATCH
    if not 1 <= size <= most:
        plain = f" (up to {MAX_PLAIN_BATCH} in the mode 'autoregressive')" * (most < size <= MAX_PLAIN_BATCH)
        advice = "give fewer at a time" if size > most else "give at least one"
        raise ValueError(f"a batch must have 1 to {most} rows{plain}, got {size}; {advice}")
