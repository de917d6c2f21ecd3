"""The server: a policy, a strategy, and the test of what is carried."""

from __future__ import annotations

from flexlora_trec import task
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from peft import get_peft_model_state_dict, set_peft_model_state_dict

from flexlora_fast.integrations.flower import FlexLoRAStrategy, RoundPolicy

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the rounds."""
    config = context.run_config
    ranks = task.ranks(config)
    model = task.build(config, max(ranks))
    found = task.questions(config["data"], config["test-questions"])

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        set_peft_model_state_dict(model, arrays.to_torch_state_dict())
        loss, accuracy = task.test(model, found)
        return MetricRecord({"test-loss": loss, "test-accuracy": accuracy})

    strategy = FlexLoRAStrategy(
        RoundPolicy.from_model(model, ranks=ranks, scale="constant", max_weight=10_000, max_layer_norm=100.0),
        directory=config["directory"] or None,
        fraction_evaluate=0.0,
        min_train_nodes=config["nodes"],
        min_available_nodes=config["nodes"],
    )
    strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(get_peft_model_state_dict(model)),
        num_rounds=config["num-server-rounds"],
        evaluate_fn=evaluate,
    )
    if config["out"]:
        model.save_pretrained(config["out"])  # as the last evaluation left it
