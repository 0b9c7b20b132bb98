"""The verb of the command line for rounds in which the teacher writes."""

from cluster.arguments import Address, ConfigPath, Fresh, Overrides, Service
from cluster.session import interrupts

KEPT = "Interrupted; what is done is kept, and the same command goes on."


def active(
    config: ConfigPath,
    overrides: Overrides = None,
    service: Service = None,
    fresh: Fresh = False,
    address: Address = None,
) -> None:
    """Rounds: train, evaluate, let the teacher write, train on.

    The teacher writes for what the student gets wrong.
    """
    from cluster.commands.active import active

    with interrupts.interrupted_as(lambda: KEPT):
        active(config, overrides or [], service=service, fresh=fresh, address=address)
