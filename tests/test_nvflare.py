"""NVFlare's aggregator and filter, without its servers: models in, one model out, through NVFlare's own code."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("nvflare", reason="NVFlare is not installed: pip install 'flexlora_fast[nvflare]'")

from nvflare.apis.dxo import DXO, DataKind, from_shareable
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.app_common.abstract.fl_model import FLModel, ParamsType
from nvflare.app_common.utils.fl_model_utils import FLModelUtils
from nvflare.app_opt.pt.decomposers import TensorDecomposer
from nvflare.app_opt.pt.lazy_tensor_dict import LazyTensorDict
from nvflare.fuel.utils import fobs
from safetensors.torch import save_file

import flexlora_fast as ff
from flexlora_fast.errors import AdapterError, OptionError
from flexlora_fast.integrations.nvflare import FlexLoRAAggregator, FlexLoRAFilter, FlexLoRARecipe, GlobalAdapter
from tests import rounds
from tests.states import HOSTILE, A, check, expected, policy, state

WEIGHT = "NUM_STEPS_CURRENT_ROUND"
MIXED = [(2, 10), (4, 20), (8, 30)]


def result(params: Any = None, name: str = "site-1", weight: Any = 10, **more: Any) -> FLModel:
    meta = {"client_name": name} | ({} if weight is None else {WEIGHT: weight})
    return FLModel(params=state() if params is None else params, meta=meta, **more)


def honest(**metrics: Any) -> list[FLModel]:
    sent = [(state(rank, seed), f"site-{seed + 1}", weight) for seed, (rank, weight) in enumerate(MIXED)]
    return [
        result(params, name, weight, metrics={key: values[i] for key, values in metrics.items()} or None)
        for i, (params, name, weight) in enumerate(sent)
    ]


def after(aggregator: FlexLoRAAggregator, *others: FLModel, **metrics: Any) -> FLModel:
    """One round, in NVFlare's order of calls."""
    aggregator.reset_stats()
    for model in (*others, *honest(**metrics)):
        aggregator.accept_model(model)
    return aggregator.aggregate_model()


def test_a_round_of_mixed_ranks() -> None:
    found = after(FlexLoRAAggregator(policy()))
    assert found.params_type == ParamsType.FULL
    want = expected([state(rank, seed) for seed, (rank, _) in enumerate(MIXED)], [w for _, w in MIXED], rank=8)
    check(found.params, want)
    numbers = found.meta["flexlora"]
    assert (numbers["accepted"], numbers["refused"]) == (3, 0)
    assert numbers["norm"] > 0 and "energy-kept-r2" in numbers


def model_of(params: Any) -> FLModel:
    model = result(name="bad")
    model.params = params  # FLModel refuses some of these itself; a stranger's bytes may make them
    return model


MALFORMED: dict[str, tuple[FLModel, str]] = {
    **{what: (model_of(params), code) for what, (params, code) in HOSTILE.items()},
    "a difference": (result(name="bad", params_type="DIFF"), "params-type"),
    "metrics alone": (FLModel(metrics={"loss": 1.0}, meta={"client_name": "bad", WEIGHT: 1}), "params-type"),
    "NaN steps": (result(name="bad", weight=math.nan), "weight"),
    "negative steps": (result(name="bad", weight=-1), "weight"),
    "more steps than allowed": (result(name="bad", weight=10**9), "weight"),
    "a list of steps": (result(name="bad", weight=[1]), "weight"),
    "a million metrics": (result(name="bad", metrics=dict.fromkeys(range(10**5), 1.0)), "metrics"),
    "a second one of a site": (result(name="site-2", weight=1), "incompatible"),
}


@pytest.mark.parametrize("what", MALFORMED)
def test_a_malformed_result_is_refused_and_changes_nothing(what: str) -> None:
    bad, code = MALFORMED[what]
    aggregator = FlexLoRAAggregator(policy())
    aggregator.reset_stats()
    for model in honest()[1:]:
        aggregator.accept_model(model)
    aggregator.accept_model(bad)
    aggregator.accept_model(honest()[0])
    found, alone = aggregator.aggregate_model(), after(FlexLoRAAggregator(policy()))
    assert [refusal.code for refusal in aggregator.refused] == [code]
    assert all(torch.equal(found.params[key], alone.params[key]) for key in alone.params)
    assert found.meta["flexlora"][f"refused-{code}"] == 1


def test_who_says_nothing_about_itself_is_refused() -> None:
    aggregator = FlexLoRAAggregator(policy())
    for meta in ({}, {"client_name": 7}, None, [1]):
        model = result()
        model.meta = meta
        aggregator.accept_model(model)
    assert len(aggregator.refused) == 4


def test_a_round_that_changes_nothing_leaves_nvflares_global_model() -> None:
    aggregator = FlexLoRAAggregator(policy(), options={"min_clients": 4})
    carried = FLModel(params=state(8), metrics={})
    before = {key: x.clone() for key, x in carried.params.items()}
    for others in ((), (result({}, "bad"),)):
        found = after(aggregator, *others)
        FLModelUtils.update_model(carried, found)
        assert all(torch.equal(carried.params[key], before[key]) for key in before)
        assert found.meta["flexlora"]["accepted"] == 3
        FLModelUtils.to_shareable(found)
    aggregator.reset_stats()
    assert aggregator.aggregate_model().params == {}


def test_a_round_replaces_nvflares_global_model() -> None:
    carried, found = FLModel(params=state(8)), after(FlexLoRAAggregator(policy()))
    FLModelUtils.update_model(carried, found)
    assert carried.params is found.params


def test_metrics_are_averaged_over_the_accepted_sites_by_weight() -> None:
    bad = result({}, "bad", metrics={"loss": 1e9})
    found = after(FlexLoRAAggregator(policy()), bad, loss=[1.0, 2.0, 3.0], f1=[0.5, math.nan, "x"])
    assert found.metrics == pytest.approx({"loss": (10 + 40 + 90) / 60, "f1": 0.5})
    assert after(FlexLoRAAggregator(policy())).metrics is None


def test_a_site_without_steps_counts_one_as_in_nvflare() -> None:
    aggregator = FlexLoRAAggregator(policy())
    for seed, weight in enumerate((None, 3)):
        aggregator.accept_model(result(state(4, seed), f"site-{seed}", weight))
    check(aggregator.aggregate_model().params, expected([state(4, 0), state(4, 1)], [1, 3], rank=8))


def test_a_defence_takes_its_options() -> None:
    aggregator = FlexLoRAAggregator(policy(), options={"defence": "clip"})
    found = after(aggregator)
    assert aggregator.update is not None and aggregator.update.defence is not None
    assert found.params_type == ParamsType.FULL


def test_a_private_round_is_refused_as_counts_would_go_out() -> None:
    with pytest.raises(OptionError, match="a private round is none in NVFlare"):
        FlexLoRAAggregator(policy(), options={"privacy": object()})


def test_what_goes_out_with_the_model_names_no_site() -> None:
    found = after(FlexLoRAAggregator(policy()), result({"x": 1}, "bad"), loss=[1.0, 2.0, 3.0])
    assert "site" not in json.dumps([found.meta, found.metrics]) and "bad" not in json.dumps(found.meta)


def test_bfloat16_crosses_nvflares_wire_bit_for_bit_into_the_round() -> None:
    fobs.register(TensorDecomposer)
    sent = state(4, dtype=torch.bfloat16)
    shareable = fobs.loads(fobs.dumps(FLModelUtils.to_shareable(FLModel(params=sent))))
    got = FLModelUtils.from_shareable(shareable).params
    assert all(torch.equal(got[key], sent[key]) and got[key].dtype == torch.bfloat16 for key in sent)
    aggregator = FlexLoRAAggregator(policy())
    aggregator.accept_model(result(got))
    found = aggregator.aggregate_model().params
    check(found, expected([sent], [1], rank=8))
    assert all(x.dtype == torch.float32 for x in found.values())


def test_tensors_that_nvflare_left_on_disk(tmp_path: Path) -> None:
    sent, files = state(4), {}
    for number, (key, x) in enumerate(sent.items()):
        path = str(tmp_path / f"{number}.safetensors")
        save_file({key: x}, path)
        files[key] = (path, key)
    lazy = LazyTensorDict(files, str(tmp_path))
    aggregator = FlexLoRAAggregator(policy())
    aggregator.accept_model(result({key: lazy.make_lazy_ref(key) for key in sent}))
    assert not aggregator.refused
    check(aggregator.aggregate_model().params, expected([sent], [1], rank=8))


def context(peer: str | None) -> FLContext:
    found = FLContext()
    if peer is not None:
        other = FLContext()
        other.put(key="__identity_name__", value=peer, private=False, sticky=False)
        found.set_peer_context(other)
    return found


def test_other_controllers_results_are_of_the_site_that_nvflare_names() -> None:
    aggregator = FlexLoRAAggregator(policy())
    for model, name in zip(honest(), ("a", "b", "c"), strict=True):
        model.meta["client_name"] = "site-of-another"
        assert aggregator.accept(FLModelUtils.to_shareable(model), context(name))
    assert not aggregator.accept(FLModelUtils.to_shareable(result()), context(None))
    assert not aggregator.accept(Shareable(), context("d"))
    assert not aggregator.accept(FLModelUtils.to_shareable(result({"x": 1})), context("e"))
    shareable = aggregator.aggregate(FLContext())
    assert aggregator.update is not None
    assert [client.name for client in aggregator.update.clients] == ["a", "b", "c"]
    want = expected([state(rank, seed) for seed, (rank, _) in enumerate(MIXED)], [w for _, w in MIXED], rank=8)
    check(from_shareable(shareable).data, want)


@pytest.mark.parametrize("meta", [None, [], "text", {"client_name": ["x"], WEIGHT: 10}], ids=str)
def test_meta_that_is_none_never_raises(meta: Any) -> None:
    aggregator = FlexLoRAAggregator(policy())
    aggregator.reset_stats()
    model = result()
    model.meta = meta
    aggregator.accept_model(model)
    assert len(aggregator.refused) == 1 and not aggregator._served.clients
    assert after(aggregator).params_type == ParamsType.FULL


def test_steps_and_factors_of_numpy() -> None:
    """``server_expected_format="numpy"`` brings arrays, and scripts count in NumPy's numbers."""
    aggregator = FlexLoRAAggregator(policy())
    aggregator.reset_stats()
    for number, (rank, weight) in enumerate(MIXED):
        params = {key: tensor.numpy() for key, tensor in state(rank, number).items()}
        aggregator.accept_model(result(params, f"site-{number + 1}", np.int64(weight), metrics={"loss": np.float32(1)}))
    found = aggregator.aggregate_model()
    assert not aggregator.refused
    assert all(
        torch.equal(found.params[key], tensor) for key, tensor in after(FlexLoRAAggregator(policy())).params.items()
    )
    assert found.metrics == {"loss": 1.0}


def test_metrics_with_endless_names_are_left_out() -> None:
    found = after(FlexLoRAAggregator(policy()), **{"x" * 257: [1.0, 2.0, 3.0], "loss": [1.0, 1.0, 1.0]})
    assert found.metrics == {"loss": pytest.approx(1.0)}


@pytest.mark.parametrize("numpy", [False, True])
@pytest.mark.parametrize("rank", [1, 2, 4, 8])
def test_the_filter_cuts_to_the_sites_rank_with_the_scale_kept(rank: int, numpy: bool) -> None:
    params = after(FlexLoRAAggregator(policy())).params
    want = expected([state(r, seed) for seed, (r, _) in enumerate(MIXED)], [w for _, w in MIXED], rank=rank)
    sent = {key: x.numpy() for key, x in params.items()} if numpy else params
    shareable = DXO(DataKind.WEIGHTS, sent, {"round": 1}).to_shareable()
    dxo = from_shareable(FlexLoRAFilter(policy(), rank).process(shareable, context("server")))
    assert all(isinstance(x, np.ndarray if numpy else torch.Tensor) for x in dxo.data.values())
    assert dxo.meta["round"] == 1
    found = {key: torch.as_tensor(x) for key, x in dxo.data.items()}
    assert len(found[A]) == rank
    check(found, want)
    assert all(len(x) in (8, *x.shape) for x in params.values())


def test_the_filter_leaves_what_is_no_model() -> None:
    shareable = DXO(DataKind.METRICS, {"loss": 1.0}).to_shareable()
    assert from_shareable(FlexLoRAFilter(policy(), 2).process(shareable, context("server"))).data == {"loss": 1.0}
    with pytest.raises(AdapterError, match="the policy lists"):
        FlexLoRAFilter(policy(), 2).process(
            DXO(DataKind.WEIGHTS, {"x": torch.ones(1)}).to_shareable(), context("server")
        )
    with pytest.raises(OptionError, match="rank 3"):
        FlexLoRAFilter(policy(), 3)


def test_the_initial_model_is_a_folder_by_its_state_dict_keys(tmp_path: Path) -> None:
    adapter = rounds.client("server", rank=8, alpha=8).but(extras={"classifier.weight": torch.ones(2, 3)}).adapter()
    adapter.save(tmp_path)
    found = GlobalAdapter(tmp_path).state_dict()
    assert found.keys() == adapter.state_dict().keys()
    assert all(torch.equal(found[key], x) for key, x in adapter.state_dict().items())


def test_a_job_written_down_has_the_policy_and_each_sites_rank(tmp_path: Path) -> None:
    """What NVFlare exports, and builds the components from elsewhere."""
    from nvflare.recipe.utils import set_per_site_config

    rounds.client("server", rank=8, alpha=8).adapter().save(tmp_path / "adapter")
    script = tmp_path / "train.py"
    script.write_text("print('train')")
    model = {"class_path": "flexlora_fast.integrations.nvflare.GlobalAdapter", "args": {"folder": str(tmp_path)}}
    recipe = FlexLoRARecipe(
        name="job",
        model=model,
        min_clients=2,
        num_rounds=1,
        train_script=str(script),
        aggregator=FlexLoRAAggregator(policy(), options={"min_clients": 2}),
        server_expected_format="pytorch",
    )
    set_per_site_config(recipe, {"site-1": {}, "site-2": {}})
    for site, rank in {"site-1": 2, "site-2": 8}.items():
        recipe.add_client_input_filter(FlexLoRAFilter(policy(), rank), tasks=["train"], clients=[site])
    recipe.export(str(tmp_path / "jobs"))
    configs = {path.parent.parent.name: json.loads(path.read_text()) for path in tmp_path.rglob("config_fed_*.json")}
    controller = configs["app_server"]["workflows"][0]["args"]
    assert controller["ignore_result_error"] is True
    aggregator = controller["aggregator"]
    assert aggregator["path"].endswith("FlexLoRAAggregator")
    again = FlexLoRAAggregator(**aggregator["args"])
    assert ff.RoundPolicy.from_json(again.policy) == policy()
    assert again.options == {"min_clients": 2}
    for site, rank in {"site-1": 2, "site-2": 8}.items():
        found = configs[f"app_{site}"]["task_data_filters"][0]["filters"][0]["args"]
        assert FlexLoRAFilter(**found).rank == rank
