"""Who of several processes is still alive: each one tells the others, and names who fell silent."""

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from torch import distributed

__all__ = ["Heartbeat", "shared_store"]

_PREFIX = "lightning_mmd/heart"
_DONE = "done"


def shared_store(limit: float) -> Any:
    """Connect to the store that processes of ``torch.distributed`` have met at.

    Args:
        limit: Seconds after which a request that is not answered fails.

    Returns:
        A connection of its own; None where the processes have met elsewhere.
    """
    address, port = (os.environ.get(name) for name in ("MASTER_ADDR", "MASTER_PORT"))
    if not address or not port:
        return None
    try:
        return distributed.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
            address,
            int(port),
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=limit),
        )
    except (RuntimeError, ValueError):
        return None


class Heartbeat:
    """A thread that counts in a store all processes share, and watches the others' counts.

    A process whose count stands still for `limit` seconds is frozen, cut off or dead; one that
    failed says so itself. The thread beats whatever the main thread does, so a long step, a
    download or a slow disk is no silence.

    Args:
        store: Shared by all processes, and not used by anybody else in this one.
        rank: This process, in 0..size-1.
        size: Number of processes.
        limit: Seconds of silence, > 0.
        on_silence: Called in the thread with a sentence that names the rank. Default: print it and
            end the process with status 2, since its main thread may wait in a collective for ever.

    Raises:
        ValueError: If the limit is not positive.
    """

    def __init__(
        self,
        store: Any,
        rank: int,
        size: int,
        limit: float = 30.0,
        on_silence: Callable[[str], None] | None = None,
    ) -> None:
        if limit <= 0:
            raise ValueError(f"limit must be a positive number of seconds, got {limit}.")
        self.limit = limit
        self._store, self._rank, self._size = store, rank, size
        self._on_silence = on_silence or self._leave
        self._stop = threading.Event()
        self._lock = threading.Lock()  # a store answers one request at a time
        self._seen: dict[int, tuple[str, float]] = {}
        self._set(self._rank, f"0 {os.getpid()} {socket.gethostname()}")
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def fail(self, reason: str) -> None:
        """Tell the others that this process ends by an error.

        Args:
            reason: One line.
        """
        self._end(f"failed {reason}")

    def stop(self) -> None:
        """Tell the others that this process has done its part, and end the thread."""
        self._end(_DONE)

    def silent(self, within: float = 0.0) -> str | None:
        """Say who has failed or does not answer any more, once a collective has failed.

        Args:
            within: Seconds to wait for a sign of it, at least 0.
        """
        if self._size == 2 and self._seen.get(1 - self._rank, ("", 0))[0] != _DONE:
            return self._look(self.limit) or f"rank {1 - self._rank} does not answer any more"
        deadline = time.monotonic() + within
        while True:
            found = self._look(min(self.limit, within or self.limit))
            if found is not None or time.monotonic() >= deadline:
                return found
            time.sleep(0.2)

    def _end(self, word: str) -> None:
        self._stop.set()
        with contextlib.suppress(RuntimeError):  # the store may be gone
            self._set(self._rank, word)

    def _run(self) -> None:
        count, interval = 0, min(1.0, self.limit / 4)
        while not self._stop.wait(interval):
            count += 1
            found = None
            try:
                self._set(self._rank, f"{count} {os.getpid()} {socket.gethostname()}")
            except RuntimeError:
                found = self._store_is_gone()
            found = found or self._look(self.limit)
            if found is not None and not self._stop.is_set():
                self._on_silence(found)
                return
            if self._seen.get(0, ("", 0))[0] == _DONE:  # the store will be gone
                return

    def _look(self, limit: float) -> str | None:
        now = time.monotonic()
        for rank in range(self._size):
            if rank == self._rank:
                continue
            before, since = self._seen.get(rank, ("", now))
            if before == _DONE:
                continue
            try:
                word = self._get(rank)
            except RuntimeError:
                return self._store_is_gone()
            if word.startswith("failed"):
                return f"rank {rank} has failed: {word.removeprefix('failed ')}"
            self._seen[rank] = (word, now if word != before else since)
            if word == before and now - since >= limit:
                _, pid, host = [*word.split(), "", "", ""][:3]
                who = f" (process {pid} on {host})" if pid else ""
                return (
                    f"rank {rank}{who} has not answered for {now - since:.0f} s: it was killed, is "
                    "frozen or cut off"
                )
        return None

    def _store_is_gone(self) -> str | None:
        if self._rank == 0 or self._seen.get(0, ("", 0))[0] == _DONE:
            return None
        _, pid, host = [*self._seen.get(0, ("", 0.0))[0].split(), "", "", ""][:3]
        who = f" (process {pid} on {host})" if pid else ""
        return f"rank 0{who} does not answer any more: it was killed, is frozen or cut off"

    def _set(self, rank: int, word: str) -> None:
        with self._lock:
            self._store.set(f"{_PREFIX}/{rank}", word)

    def _get(self, rank: int) -> str:
        with self._lock:
            return self._store.get(f"{_PREFIX}/{rank}").decode()

    def _leave(self, found: str) -> None:
        advice = "This process ends; go on from the last checkpoint."
        print(f"lightning-mmd: rank {self._rank}: {found}. {advice}", file=sys.stderr, flush=True)
        os._exit(2)
