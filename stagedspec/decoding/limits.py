"""How many rows are decoded together, and how many tokens are written by default. No torch, for the command line."""

NEW_TOKENS = 128  # default of max_new_tokens
MAX_BATCH = 16
MAX_PLAIN_BATCH = 64  # of plain decoding, which has no trees


def most_rows(mode: str) -> int:
    """The most rows of a batch."""
    return MAX_PLAIN_BATCH if mode == "autoregressive" else MAX_BATCH


def check_rows(name: str, rows: int, mode: str) -> None:
    """Raises ValueError where the mode decodes fewer rows together."""
    if rows > most_rows(mode):
        plain = f" ({MAX_PLAIN_BATCH} in the mode 'autoregressive')" * (most_rows(mode) < rows <= MAX_PLAIN_BATCH)
        raise ValueError(f"{name} can be at most {most_rows(mode)}{plain}, got {rows}")
