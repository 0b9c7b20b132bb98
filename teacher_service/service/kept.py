"""What a service is told of its replicas while it runs, kept in the cluster's own store of keys, so
that a registry which is started again still knows."""

import json

from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_put

from shared.config.models.teachers import Autoscaling

NAMESPACE = b"tutelage"


def keep_replicas(service: str, replicas: int | Autoscaling) -> None:
    """Keep the number, or the bounds, that a service was given last."""
    told = replicas.model_dump() if isinstance(replicas, Autoscaling) else replicas
    _internal_kv_put(_key(service), json.dumps(told).encode(), namespace=NAMESPACE)


def kept_replicas(service: str) -> int | Autoscaling | None:
    """What was kept; None for a service that goes by what it was started with."""
    found = _internal_kv_get(_key(service), namespace=NAMESPACE)
    if not found:
        return None
    told = json.loads(found)
    return told if isinstance(told, int) else Autoscaling(**told)


def forget_replicas(service: str) -> None:
    """Keep nothing of a service that ends."""
    _internal_kv_del(_key(service), namespace=NAMESPACE)


def _key(service: str) -> bytes:
    return f"replicas:{service}".encode()
