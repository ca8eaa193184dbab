"""Rendezvous over a c10d store (TCPStore, PrefixStore, or anything with set, wait, multi_get and delete_key)."""
import datetime

from . import _native


class StoreOfTorch(_native.Store):
    """What connect() needs of a store. Methods run on the thread that is inside connect()."""

    def __init__(self, store) -> None:
        super().__init__()
        missing = [name for name in ("set", "wait", "multi_get", "delete_key") if not callable(getattr(store, name, None))]
        if missing:
            raise TypeError(f"tcp_store_group is a {type(store).__name__} without {', '.join(missing)}(); a c10d store such as "
                            "torch.distributed.TCPStore is needed")
        self._store = store

    def set(self, key: str, value: bytes) -> None:
        self._store.set(key, value)

    def wait(self, key: str, timeout_ms: int) -> bool:
        try:
            self._store.wait([key], datetime.timedelta(milliseconds=max(timeout_ms, 1)))
            return True
        except Exception as error:  # stores name expiry in the text only
            if "timeout" in str(error).lower() or "timed out" in str(error).lower():
                return False
            raise

    def get(self, key: str) -> bytes:
        return bytes(self._store.multi_get([key])[0])

    def remove(self, key: str) -> None:
        self._store.delete_key(key)
