"""A node of the app: load, train with the ordinary Trainer, send."""

from __future__ import annotations

import tempfile

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from transformers import Trainer, TrainingArguments

from examples.flower.flowertune.models import get_model, load_data, read_config

app = ClientApp()


@app.train()
def train(msg: Message, context: Context) -> Message:
    """Train the adapter on local data."""
    cfg = read_config(context.run_config)
    trainset = load_data(context.node_config["partition-id"], cfg)

    model = get_model(cfg)
    set_peft_model_state_dict(model, msg.content["arrays"].to_torch_state_dict())

    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            scratch,
            max_steps=cfg.steps,
            learning_rate=cfg.learning_rate,
            use_cpu=True,
            disable_tqdm=True,
            report_to="none",
            save_strategy="no",
        )
        results = Trainer(model, arguments, train_dataset=trainset).train()

    metrics = MetricRecord({"train_loss": results.training_loss, "num-examples": len(trainset)})
    content = RecordDict({"arrays": ArrayRecord(get_peft_model_state_dict(model)), "metrics": metrics})
    return Message(content=content, reply_to=msg)
