"""The error raised where no token can be chosen. Imports no torch, since the command line imports it at once."""


class InvalidLogitsError(RuntimeError):
    """No token can be chosen: the target's logits are NaN, all -inf or, when sampling, +inf."""


def raise_invalid(rows: list[tuple[int, int]]) -> None:
    """Raises InvalidLogitsError for the first of rows (index, length) that have no next token. A RuntimeError, as
    transformers raises where it samples."""
    for index, length in rows:
        raise InvalidLogitsError(
            f"no token can be chosen at position {length} of row {index}: after logits processors its logits are NaN, "
            "all -inf or, when sampling, +inf. Check the model's weights for NaN and overflow (float16 overflows "
            "first: try float32) and the logits processors, which must leave at least one token"
        )
