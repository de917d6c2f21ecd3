"""The server of the app: rounds, and a checkpoint after each."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from peft import get_peft_model_state_dict, set_peft_model_state_dict

from examples.flower.flowertune.models import get_model, read_config

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the rounds."""
    cfg = read_config(context.run_config)

    init_model = get_model(cfg)
    arrays = ArrayRecord(get_peft_model_state_dict(init_model))

    strategy = FedAvg(
        fraction_train=cfg.fraction_train,
        fraction_evaluate=0.0,
    )
    strategy.start(
        grid=grid,
        initial_arrays=arrays,
        num_rounds=cfg.num_server_rounds,
        evaluate_fn=get_evaluate_fn(cfg),
    )


def get_evaluate_fn(cfg: SimpleNamespace) -> Callable[[int, ArrayRecord], MetricRecord]:
    """What saves the global adapter after each round."""

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        model = get_model(cfg)
        set_peft_model_state_dict(model, arrays.to_torch_state_dict())
        model.save_pretrained(f"{cfg.save_path}/{server_round}")
        return MetricRecord()

    return evaluate
