"""Trunk outputs kept on the node's disk, for a bottom that is frozen: one call per example for the whole run.

With ``surrogate.kind = "none"`` an example's h1 never changes, so neither does its h2. An output is found again by a
digest of what would be sent. The file is the node's own: h2 is as private as h1.
"""

import hashlib
import logging
import sqlite3
import threading
from concurrent.futures import Future
from pathlib import Path

import torch
from torch import Tensor

from fl_split.model.slots import Trunk

logger = logging.getLogger(__name__)


class CachedTrunk:
    """A `slots.Trunk` that remembers what another one answered."""

    def __init__(self, trunk: Trunk, file: Path, limit_bytes: int, salt: bytes) -> None:
        """Open or make the cache.

        Args:
            trunk: Asked for what is not in the cache.
            file: An SQLite database.
            limit_bytes: Outputs are kept up to this size in all; what comes later is asked for each time.
            salt: Stands for all that an output depends on besides its input: weights, layers, wire dtype.
        """
        self._trunk, self._limit_bytes, self._salt = trunk, limit_bytes, salt
        self._lock = threading.Lock()
        file.parent.mkdir(parents=True, exist_ok=True)
        self._db = sqlite3.connect(file, check_same_thread=False, isolation_level=None)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=OFF")  # a lost entry costs one call
        self._db.execute("CREATE TABLE IF NOT EXISTS outputs (digest BLOB PRIMARY KEY, rows BLOB NOT NULL)")
        (self._size_bytes,) = self._db.execute("SELECT COALESCE(SUM(LENGTH(rows)), 0) FROM outputs").fetchone()
        self.hits = self.misses = 0  # sequences

    def start(
        self, hidden_states: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None
    ) -> "Future[Tensor]":
        """Answer from the cache what is there, ask the trunk for the rest in one call; see `slots.Trunk.start`."""
        batch, seq, _ = hidden_states.shape
        real = torch.ones(batch, seq, dtype=torch.bool) if attention_mask is None else attention_mask.bool().cpu()
        places = (torch.arange(seq)[None] if position_ids is None else position_ids.cpu()).expand(batch, seq)
        digests = [self._digest(hidden_states[i].cpu()[real[i]], places[i][real[i]]) for i in range(batch)]
        found = [self._get(digest) for digest in digests]
        missing = [i for i, rows in enumerate(found) if rows is None]
        self.hits, self.misses = self.hits + batch - len(missing), self.misses + len(missing)
        out = torch.zeros_like(hidden_states)
        for i, rows in enumerate(found):
            if rows is not None:
                out[i, real[i]] = rows.view(-1, out.shape[-1]).to(out)
        whole: Future[Tensor] = Future()
        if not missing:
            whole.set_result(out)
            return whole

        def fill(answer: "Future[Tensor]") -> None:
            try:
                for i, rows in zip(missing, answer.result(), strict=True):
                    out[i] = rows
                    self._put(digests[i], rows.cpu()[real[i]])
                whole.set_result(out)
            except BaseException as error:  # whoever waits for the result gets it
                whole.set_exception(error)

        mask = None if attention_mask is None else attention_mask[missing]
        positions = None if position_ids is None else position_ids.expand(batch, seq)[missing]
        self._trunk.start(hidden_states[missing], mask, positions).add_done_callback(fill)
        return whole

    def _digest(self, rows: Tensor, positions: Tensor) -> bytes:
        digest = hashlib.sha256(self._salt)
        digest.update(rows.float().contiguous().numpy().tobytes())
        digest.update(positions.contiguous().numpy().tobytes())
        return digest.digest()

    def _get(self, digest: bytes) -> Tensor | None:
        with self._lock:
            row = self._db.execute("SELECT rows FROM outputs WHERE digest = ?", (digest,)).fetchone()
        return None if row is None else torch.frombuffer(bytearray(row[0]), dtype=torch.float32)

    def _put(self, digest: bytes, rows: Tensor) -> None:
        data = rows.float().contiguous().numpy().tobytes()
        with self._lock:
            if self._size_bytes + len(data) > self._limit_bytes:
                if self._size_bytes <= self._limit_bytes:
                    logger.warning("the trunk cache is full (trunk.cache-mb): further outputs are asked for each time")
                    self._size_bytes = self._limit_bytes + 1
                return
            self._db.execute("INSERT OR REPLACE INTO outputs VALUES (?, ?)", (digest, data))
            self._size_bytes += len(data)

    def close(self) -> None:
        """Close the database."""
        self._db.close()
