"""A node: an ordinary PEFT model of its own rank."""

from __future__ import annotations

import torch
from flexlora_trec import task
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from peft import get_peft_model_state_dict, set_peft_model_state_dict

from flexlora_fast.integrations.flower import rank_mod


def local_rank(context: Context) -> int:
    """The node's ``lora-rank``; in a simulation, where nodes have no config of their own, that of its partition."""
    given = task.ranks(context.run_config)
    return context.node_config.get("lora-rank", given[context.node_config["partition-id"] % len(given)])


app = ClientApp(mods=[rank_mod(local_rank)])


@app.train()
def train(msg: Message, context: Context) -> Message:
    """Train on this node's questions, from the adapter that came."""
    config, node = context.run_config, context.node_config
    found = task.questions(config["data"], config["test-questions"])
    rows = found.partition(node["partition-id"], node["num-partitions"], config["dirichlet-alpha"])
    model = task.build(config, local_rank(context))
    set_peft_model_state_dict(model, msg.content["arrays"].to_torch_state_dict())
    loss = task.train(model, found, rows, config["steps"], seed=msg.content["config"]["server-round"])
    state = get_peft_model_state_dict(model)
    if node["partition-id"] == config["hostile-partition"]:
        state = {key: torch.full_like(tensor, torch.nan) for key, tensor in state.items()}
    metrics = MetricRecord({"train-loss": loss, "num-examples": len(rows)})
    return Message(RecordDict({"arrays": ArrayRecord(state), "metrics": metrics}), reply_to=msg)
