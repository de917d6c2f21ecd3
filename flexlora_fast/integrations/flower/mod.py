"""The client's side: a mod that gives a ClientApp adapters of its own rank, whatever the server sent."""

from __future__ import annotations

from collections.abc import Callable

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp.typing import ClientAppCallable, Mod

from flexlora_fast.integrations.flower import note


def flexlora_mod(msg: Message, ctx: Context, call_next: ClientAppCallable) -> Message:
    """``ClientApp(mods=[flexlora_mod])``: arrays come at this node's rank, and at the scale that goes with it.

    The rank is ``"lora-rank"`` in the node's config (``flower-supernode --node-config "lora-rank=8"``), else in the
    run's. Without either, arrays stay as they came. It is the same update cut to that rank, exactly: the server's
    columns are singular triplets in descending order. ``peft.set_peft_model_state_dict`` then takes them into a model
    of that rank. Replies are not touched: have them hold all of ``peft.get_peft_model_state_dict``, in an
    ``ArrayRecord``, or in ``to_record`` where factors are bfloat16, which ``ArrayRecord`` refuses.

    A server's question for the rank is answered here. Raises ``OptionError`` for a rank that is none, or that the
    server does not admit.
    """
    return _run(msg, ctx, call_next, _configured)


def rank_mod(rank: Callable[[Context], int]) -> Mod:
    """``flexlora_mod`` for nodes that find out their rank by a function: in a simulation they have no config of their
    own but ``partition-id``.
    """

    def mod(msg: Message, ctx: Context, call_next: ClientAppCallable) -> Message:
        return _run(msg, ctx, call_next, lambda context: note.checked_rank(rank(context), "rank_mod's function"))

    return mod


def _configured(ctx: Context) -> int | None:
    for where, config in (("the node's config", ctx.node_config), ("the run's config", ctx.run_config)):
        if note.RANK in config:
            return note.checked_rank(config[note.RANK], where)
    return None


def _run(msg: Message, ctx: Context, call_next: ClientAppCallable, rank_of: Callable[[Context], int | None]) -> Message:
    said = msg.content.get(note.KEY)
    if not isinstance(said, ConfigRecord):  # a message of another strategy
        return call_next(msg, ctx)
    rank = rank_of(ctx)
    if "ask" in said:
        return Message(RecordDict({note.KEY: ConfigRecord({} if rank is None else {note.RANK: rank})}), reply_to=msg)
    if rank is not None:
        key = str(said["arrays"])
        msg.content[key] = note.localized(msg.content[key], said, rank)
    return call_next(msg, ctx)
