"""The error raised where no token can be chosen. Imports no torch, since the command line imports it at once."""


class InvalidLogitsError(RuntimeError):
    """No token can be chosen: the target's logits are NaN, all -inf or, when sampling, +inf.

    positions: for each row that has no next token, by its index, the position where it would be.
    """

    def __init__(self, positions: dict[int, int]):
        self.positions = positions
        row, position = next(iter(positions.items()))
        super().__init__(self.reason(position, f" of row {row}"))

    @staticmethod
    def reason(position: int, where: str = "") -> str:
        """What the error says of one row. where: names the row."""
        return (
            f"no token can be chosen at position {position}{where}: after logits processors its logits are NaN, all "
            "-inf or, when sampling, +inf. Check the model's weights for NaN and overflow (float16 overflows first: "
            "try float32) and the logits processors, which must leave at least one token"
        )


def raise_invalid(positions: dict[int, int]) -> None:
    """Raises InvalidLogitsError if there is any row without a next token. A RuntimeError, as transformers raises where
    it samples."""
    if positions:
        raise InvalidLogitsError(positions)
