"""Which shards a run reads, which it only compares with what is done, and how many there are."""

from __future__ import annotations

from collections.abc import Mapping

from m3cli.corpus.reader import Action
from m3cli.errors import ForeignFolder
from m3cli.records import DoneEntry, Shard, ShardText


class Share:
    """One worker's shards: every `num_workers`-th from `worker` on. A plain run has them all."""

    def __init__(
        self,
        done: Mapping[int, DoneEntry],
        *,
        worker: int,
        num_workers: int,
        changed: frozenset[int] = frozenset(),
        out: str,
    ) -> None:
        self.num_shards = 0
        "asked about so far; all there are once the reader is through"
        self._done = done
        self._worker = worker
        self._num_workers = num_workers
        self._changed = changed
        self._out = out

    def is_mine(self, index: int) -> bool:
        """Whether a shard falls to this worker."""
        return index % self._num_workers == self._worker

    def count_todo(self, num_shards: int) -> int:
        """Count this worker's shards that are not done, of all there are."""
        return sum(self.is_mine(index) and index not in self._done for index in range(num_shards))

    def ask(self, shard: Shard) -> Action:
        """Say what the reader is to do with a shard; it asks once for each, in order."""
        self.num_shards += 1
        if not self.is_mine(shard.index):
            return "skip"
        if shard.index not in self._done:
            return "read"
        return "hash" if shard.source in self._changed else "skip"

    def is_wanted(self, text: ShardText) -> bool:
        """Whether a shard that came from the reader is to be encoded; one that is done must be what it was.

        Raises:
            ForeignFolder: the input of a finished shard has changed.
        """
        entry = self._done.get(text.shard.index)
        if entry is None:
            return self.is_mine(text.shard.index)
        if entry.input_hash != text.input_hash:
            raise ForeignFolder(
                f"{entry.source} has changed since shard {entry.shard.index} of {self._out} was made from it; "
                "use another --out to encode what it is now"
            )
        return False
