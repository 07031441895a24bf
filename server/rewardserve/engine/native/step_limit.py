"""How large a forward may be: smaller after one that ran out of memory, and slowly larger again."""

MAX_PATIENCE = 256


class StepLimit:
    """Each time that it was raised too soon it waits twice as long before it is raised again, so that a device that is
    short of memory for good runs out once in some hundred forwards, and not in every third.
    """

    def __init__(self, most: int, least: int) -> None:
        """Tokens of one forward."""
        self._most, self._least = most, least
        self.tokens = most
        self._patience = 1  # forwards that end well before it is doubled
        self._num_well = 0  # since it was changed
        self._is_falling = False  # nothing has ended well since it was lowered
        self._before = (most, 1)  # it was lowered, tokens and patience

    def ended_well(self) -> None:
        self._is_falling = False
        self._num_well += 1
        if self._num_well >= self._patience:
            if self.tokens == self._most:
                self._patience = 1
            self.tokens = min(self._most, 2 * self.tokens)
            self._num_well = 0

    def ran_out(self, num_tokens: int) -> None:
        """With a forward of so many."""
        self._before = (self.tokens, self._patience)
        if not self._is_falling:
            self._patience = min(MAX_PATIENCE, 2 * self._patience)
        self._is_falling, self._num_well = True, 0
        self.tokens = min(self.tokens, max(self._least, num_tokens // 2))

    def was_not_it(self) -> None:
        """One item alone ran out of memory, however small the forward: it was lowered for nothing."""
        self.tokens, self._patience = self._before
        self._is_falling, self._num_well = False, 0
