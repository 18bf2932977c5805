"""Flower's SuperNode, mended: it sends what is ready, whenever it is.

Flower 1.41's looks for replies only after a message has come. When a message is dropped midway, since its run has ended
meanwhile (SuperLink was killed and started again), every later reply lies there until the next message comes, which
the coordinator sends when it has that reply.
"""

from typing import Any

from polyclinic.errors import Refused

PULL = "_pull_and_store_message"
"""Of flwr.supernode.start_client_internal: gives None where no message has come, and then nothing is sent."""


def main() -> None:
    """As Flower's program of that name."""
    from flwr.supernode import start_client_internal
    from flwr.supernode.cli.flower_supernode import flower_supernode

    mend(start_client_internal)
    flower_supernode()


def mend(node: Any) -> None:
    """Have Flower's module `node` look for replies where no message has come, too.

    Raises:
        Refused: the module is not the one that this was written for.
    """
    pull = getattr(node, PULL, None)
    if not callable(pull):
        raise Refused(
            f"this version of Flower has no {PULL}: the node does not start",
            "install the version of flwr that polyclinic asks for",
        )

    def pull_or_send(*, state: Any, **rest: Any) -> int | None:
        run: int | None = pull(state=state, **rest)
        return 0 if run is None and waits(state) else run

    setattr(node, PULL, pull_or_send)


def waits(state: Any) -> bool:
    """Is there a reply that has not been sent?"""
    with state.lock_msg_store:
        entries = list(state.msg_store.values())
    return any(entry.message.metadata.reply_to_message_id and not entry.is_retrieved for entry in entries)


if __name__ == "__main__":
    main()
