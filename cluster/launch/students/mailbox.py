"""Mailbox: one assignment, put by the driver and taken by every worker once it is there."""

import time
import uuid

from ray import cloudpickle
from ray.experimental import internal_kv

from shared.run.plan import Assignment

NAMESPACE = b"tutelage"
POLL_S = 0.05


class Mailbox:
    """A place in the cluster's own key-value store; pickles as its address."""

    def __init__(self) -> None:
        self._key = uuid.uuid4().bytes

    def put(self, assignment: Assignment) -> None:
        """Leave the assignment for all who take it, however often."""
        content = cloudpickle.dumps(assignment)  # type: ignore[attr-defined]
        internal_kv._internal_kv_put(self._key, content, namespace=NAMESPACE)

    def take(self) -> Assignment:
        """The assignment, waited for as long as this process lives."""
        while (content := self._content()) is None:
            time.sleep(POLL_S)
        return cloudpickle.loads(content)

    def close(self) -> None:
        """Remove what was left."""
        internal_kv._internal_kv_del(self._key, namespace=NAMESPACE)

    def _content(self) -> bytes | None:
        return internal_kv._internal_kv_get(self._key, namespace=NAMESPACE)
