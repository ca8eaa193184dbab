"""Rendezvous over a c10d store (TCPStore, PrefixStore, or anything with set, wait, multi_get and delete_key)."""
import datetime
import time


class StoreOfTorch:
    """What connect() needs of a store. Methods run on the thread that is inside connect()."""

    def __init__(self, store, name: str = "tcp_store_group") -> None:
        missing = [name for name in ("set", "wait", "multi_get", "delete_key") if not callable(getattr(store, name, None))]
        if missing:
            raise TypeError(f"{name} is a {type(store).__name__} without {', '.join(missing)}(); a c10d store such as "
                            "torch.distributed.TCPStore is needed")
        self._store = store

    def set(self, key: str, value: bytes) -> None:
        """Sets the key, replacing an old value."""
        self._store.set(key, value)

    def wait(self, key: str, timeout_ms: int) -> bool:
        """Waits until the key exists; False when it does not within the time."""
        # A store that can answer at once is asked again and again: a wait inside a TCPStore locks its connection for
        # everybody else in this process, and every wait that runs out prints warnings.
        if callable(getattr(self._store, "check", None)):
            return self._poll(key, timeout_ms)
        try:
            self._store.wait([key], datetime.timedelta(milliseconds=max(timeout_ms, 1)))
            return True
        except TimeoutError:
            return False
        except Exception as error:  # torch's stores name expiry in the text only
            if "timeout" in str(error).lower() or "timed out" in str(error).lower():
                return False
            raise

    def _poll(self, key: str, timeout_ms: int) -> bool:
        end, pause = time.monotonic() + timeout_ms / 1000, 0.001
        while not self._store.check([key]):
            left = end - time.monotonic()
            if left <= 0:
                return False
            time.sleep(min(pause, left))
            pause = min(2 * pause, 0.02)
        return True

    def get(self, key: str) -> bytes:
        """The value of an existing key."""
        return bytes(self._store.multi_get([key])[0])

    def remove(self, key: str) -> None:
        """Deletes the key; a missing one is no error."""
        self._store.delete_key(key)
