"""Which endpoint a prompt goes to. Pure: names and digests, no channels.

Rendezvous hashing keeps a prompt's groups on one endpoint, whose prefix cache then knows the prompt. Every client, in
every process, comes to the same choice; an endpoint that goes away moves only its own prompts.
"""

import hashlib
import time
from collections.abc import Callable, Collection, Sequence


def rendezvous_order(names: Sequence[str], key: bytes) -> list[str]:
    """All names, the key's favourite first."""
    return sorted(names, key=lambda name: _weight(name, key), reverse=True)


def _weight(name: str, key: bytes) -> bytes:
    # hashlib, not hash(): the latter differs from process to process. The digest separates name from key.
    return hashlib.blake2b(key, digest_size=8, key=hashlib.blake2b(name.encode(), digest_size=32).digest()).digest()


class Endpoints:
    """The endpoints of a client, and which of them to avoid for a while."""

    def __init__(
        self, names: str | Sequence[str], cool_down_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.names = (names,) if isinstance(names, str) else tuple(names)
        _check(self.names)
        self._cool_down_s = cool_down_s
        self._clock = clock
        self._avoid_until: dict[str, float] = {}
        self._known: set[str] = set()

    def __len__(self) -> int:
        return len(self.names)

    def choose(self, key: bytes, tried: Collection[str] = ()) -> str:
        """The key's first choice among those not in `tried`; one that is cooling down only if there is no other."""
        if len(self.names) == 1:
            return self.names[0]
        order = [name for name in rendezvous_order(self.names, key) if name not in tried]
        return min(order, key=self._is_cooling)  # min is stable: rendezvous order among equals

    def unavailable(self, name: str, at_least_s: float = 0.0) -> None:
        """Avoid this endpoint for the cool-down, or for longer."""
        until = self._clock() + max(self._cool_down_s, at_least_s)
        self._avoid_until[name] = max(until, self._avoid_until.get(name, 0.0))

    def answered(self, name: str) -> None:
        """It is back, whatever we thought."""
        self._known.add(name)
        self._avoid_until.pop(name, None)

    def has_answered(self, name: str) -> bool:
        """Ever: so its address is right, and it will be back."""
        return name in self._known

    def _is_cooling(self, name: str) -> bool:
        return self._avoid_until.get(name, 0.0) > self._clock()


def _check(names: tuple[str, ...]) -> None:
    if not names or len(set(names)) != len(names):
        raise ValueError(f"endpoints are one or more different names, not {names}")
    for name in names:
        if not isinstance(name, str) or not name or name.startswith(("http://", "https://")):
            raise ValueError(f"an endpoint is a gRPC target such as 'host:port' or 'unix:/path', not {name!r}")
