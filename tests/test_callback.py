"""The functions and the callback for Hugging Face's ``Trainer``, on tiny models with random weights."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainingArguments

import flexlora_fast as ff
from flexlora_fast.errors import AdapterError, OptionError, RankError, RefusedError
from flexlora_fast.integrations.transformers import FlexLoRACallback, receive, submit
from tests.models import LLAMA, randomize, tiny, tokens, trained_adapter

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:.*gradient_checkpointing.* is deprecated"
    ),  # transformers', and PEFT's use of it
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method"),
]
TARGETS = ["q_proj", "v_proj"]
PATTERNED = {"rank_pattern": {"v_proj": 5}}


def language_model(seed: int = 0, rank: int = 2, *, dtype: torch.dtype = torch.float32, **config: Any) -> PeftModel:
    """A tiny Llama with float32 LoRA factors that look trained."""
    base = tiny("Llama", **LLAMA).to(dtype)
    model = get_peft_model(base, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS, **config))
    randomize(model, seed)
    return model


def rows(count: int = 12) -> list[dict[str, Tensor]]:
    ids = torch.randint(0, 32, (count, 6), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": x, "labels": x} for x in ids]


def trainer_for(model: Any, folder: Path, *callbacks: Any, data: Any = None, **options: Any) -> Trainer:
    given: dict[str, Any] = {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2, **options}
    arguments = TrainingArguments(
        str(folder),
        **given,
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        dataloader_pin_memory=False,
    )
    trainer = Trainer(model, arguments, train_dataset=rows() if data is None else data, callbacks=list(callbacks))
    trainer.remove_callback(PrinterCallback)
    return trainer


def same(adapter: ff.Adapter, model: Any) -> bool:
    live = ff.Adapter.from_peft(model).state_dict()
    return all(torch.equal(live[key], value) for key, value in adapter.state_dict().items())


def adam_after_steps(model: nn.Module) -> torch.optim.AdamW:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for row in rows(2):
        model(input_ids=row["input_ids"][None], labels=row["labels"][None]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


# -- the functions ---


def test_receive_drops_the_moments_of_what_was_overwritten_and_no_others() -> None:
    model = language_model(modules_to_save=["lm_head"], **PATTERNED)
    optimizer = adam_after_steps(model)
    sent = ff.Adapter.from_peft(language_model(7, modules_to_save=["lm_head"], **PATTERNED))
    unchanged = "model.layers.1.self_attn.q_proj"
    factors = {layer: sent.factors(layer) for layer in sent.layers}
    factors[unchanged] = ff.Adapter.from_peft(model).factors(unchanged)
    skeleton = sent.skeleton
    sent = ff.Adapter.from_factors(factors, skeleton.specs, skeleton.scales, sent.config, extras=sent.extras)
    steps = {name: int(optimizer.state[p]["step"]) for name, p in model.named_parameters() if p.requires_grad}
    assert set(steps.values()) == {2}

    assert receive(model, sent, optimizer=optimizer) is False
    assert same(sent, model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kept = "lora_" not in name or "layers.1.self_attn.q_proj" in name
            assert (parameter in optimizer.state) == kept, name
    for row in rows(1):
        model(input_ids=row["input_ids"][None], labels=row["labels"][None]).loss.backward()
    optimizer.step()
    steps = {name: int(optimizer.state[p]["step"]) for name, p in model.named_parameters() if p.requires_grad}
    assert {step for name, step in steps.items() if "q_proj" in name and "layers.1" in name} == {3}
    assert {step for name, step in steps.items() if "v_proj" in name} == {1}


def test_a_first_step_after_receiving_is_that_of_a_new_optimizer() -> None:
    """The moments of the old basis would pull the new factors somewhere else."""
    sent = ff.Adapter.from_peft(language_model(7))
    used, fresh = language_model(), language_model()
    old = adam_after_steps(used)
    receive(used, sent, optimizer=old)
    receive(fresh, sent)
    new = torch.optim.AdamW([p for p in fresh.parameters() if p.requires_grad], lr=1e-2)
    for model, optimizer in ((used, old), (fresh, new)):
        row = rows(1)[0]
        model(input_ids=row["input_ids"][None], labels=row["labels"][None]).loss.backward()
        optimizer.step()
    assert same(ff.Adapter.from_peft(used), fresh)


@pytest.mark.parametrize("options", [{}, PATTERNED, {"use_rslora": True}], ids=str)
def test_a_global_update_comes_at_the_model_s_ranks(options: dict[str, Any]) -> None:
    update = ff.aggregate([ff.Adapter.from_peft(language_model(seed, 3 + seed)) for seed in range(3)])
    model = language_model(9, **options)
    optimizer = adam_after_steps(model)
    assert receive(model, update, optimizer=optimizer) is False
    got = ff.Adapter.from_peft(model)
    for layer in got.layers:
        assert got.rank(layer) == (5 if options is PATTERNED and "v_proj" in layer else 2)
        torch.testing.assert_close(got.delta(layer), update.delta(layer, got.rank(layer)), rtol=1e-5, atol=1e-6)


def test_heads_come_with_a_global_update_and_keep_their_moments() -> None:
    clients = [ff.Adapter.from_peft(language_model(seed, 3, modules_to_save=["lm_head"])) for seed in range(2)]
    model = language_model(9, modules_to_save=["lm_head"])
    optimizer = adam_after_steps(model)
    receive(model, ff.aggregate(clients), optimizer=optimizer)
    ((key, head),) = ff.Adapter.from_peft(model).extras.items()
    torch.testing.assert_close(head, (clients[0].extras[key] + clients[1].extras[key]) / 2)
    assert [tuple(parameter.shape) for parameter in optimizer.state] == [tuple(head.shape)]


def test_a_global_update_at_another_rank_asks_for_a_new_optimizer() -> None:
    update = ff.aggregate([ff.Adapter.from_peft(language_model(seed, 4)) for seed in range(2)], rank=8)
    model = language_model(9, **PATTERNED)
    optimizer = adam_after_steps(model)
    before = ff.Adapter.from_peft(model)
    with pytest.raises(RankError, match=r"q_proj.*rank 6 was received and the model has 2.*new Trainer"):
        receive(model, update, rank=6, optimizer=optimizer)
    assert same(before, model) and len(optimizer.state) == 8
    assert receive(model, update, rank=6) is True
    assert {ff.Adapter.from_peft(model).rank(layer) for layer in before.layers} == {6}
    with pytest.raises(AdapterError, match=r"layer 'model.layers.0.*make a new Trainer"):
        receive(model, update, optimizer=optimizer)


def test_what_cannot_be_received() -> None:
    model = language_model()
    with pytest.raises(OptionError, match="rank=3 goes with a GlobalUpdate"):
        receive(model, ff.Adapter.from_peft(model), rank=3)
    with pytest.raises(OptionError, match="a dict was received"):
        receive(model, {})  # type: ignore[arg-type]
    with pytest.raises(AdapterError, match="no adapter 'other'"):
        receive(model, ff.Adapter.from_peft(model), adapter_name="other")


def test_sharded_factors_are_refused() -> None:
    """FSDP's are DTensors: a write to one fails half way through the model."""
    from torch import distributed
    from torch.distributed.tensor import distribute_tensor

    model = language_model()
    sent = ff.Adapter.from_peft(language_model(7))
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        factor = model.get_submodule("base_model.model.model.layers.1.self_attn.v_proj").lora_B["default"]
        factor.weight = nn.Parameter(distribute_tensor(factor.weight, distributed.init_device_mesh("cpu", (1,))))
        before = [p.detach().clone() for p in model.parameters()]
        with pytest.raises(AdapterError, match=r"layer 'model.layers.1.self_attn.v_proj'.*sharded"):
            receive(model, sent)
        assert all(bool((p == then).all()) for p, then in zip(model.parameters(), before, strict=True))
    finally:
        distributed.destroy_process_group()


def test_wrapped_models_are_unwrapped() -> None:
    model = language_model()
    sent = ff.Adapter.from_peft(language_model(7))
    compiled = torch.compile(model)
    assert receive(compiled, sent, optimizer=adam_after_steps(model)) is False
    assert same(sent, model)
    found: list[Any] = []
    adapter = submit(compiled, lambda *given, client: found.append((*given, client)), 30.0, "c")
    assert found == [(adapter, 30.0, "c")] and adapter.client == "c" and same(adapter, model)


# -- the callback ---


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {}),
        (torch.float32, {"gradient_accumulation_steps": 2}),
        (torch.float32, {"optim": "adafactor"}),
        (torch.bfloat16, {}),
        (torch.bfloat16, {"gradient_checkpointing": True}),
        (torch.bfloat16, {"bf16": True}),
    ],
    ids=str,
)
def test_rounds_with_one_trainer(dtype: torch.dtype, options: dict[str, Any], tmp_path: Path) -> None:
    """The optimizer lives through all rounds, each begins from what was received, and what is submitted was trained."""
    torch.manual_seed(0)
    models = {name: language_model(3, rank, dtype=dtype) for name, rank in (("a", 2), ("b", 4))}
    inbox: dict[str, Any] = dict.fromkeys(models)
    arrived: dict[str, Any] = {}

    def upload(adapter: ff.Adapter, weight: float, client: str | None) -> None:
        arrived[str(client)] = (adapter, weight)

    trainers = {
        name: trainer_for(
            model, tmp_path / name, FlexLoRACallback(lambda name=name: inbox[name], upload, client=name), **options
        )
        for name, model in models.items()
    }
    losses = []
    for _ in range(3):
        losses.append(sum(trainer.train().training_loss for trainer in trainers.values()))
        update = ff.aggregate(
            [adapter for adapter, _ in arrived.values()],
            weights=[weight for _, weight in arrived.values()],
            clients=list(arrived),
        )
        for name, model in models.items():
            adapter, weight = arrived[name]
            # Three batches an epoch: with two to a step, the second step has one, and the third is of the next epoch.
            assert same(adapter, model) and weight == (20 if "gradient_accumulation_steps" in options else 12)
            inbox[name] = update.adapter(client=name)
    assert losses[2] < losses[0]
    assert {p.dtype for n, p in models["a"].named_parameters() if "lora_" in n} == {torch.float32}


def test_adam_begins_anew_in_the_rotated_basis(tmp_path: Path) -> None:
    model = language_model()
    sent: list[ff.Adapter | None] = [None, ff.Adapter.from_peft(language_model(7)), None]
    rounds = iter(sent)
    trainer = trainer_for(model, tmp_path, FlexLoRACallback(lambda: next(rounds)))
    steps = []
    for _ in sent:
        trainer.train()
        assert trainer.optimizer is not None
        steps.append({int(state["step"]) for state in trainer.optimizer.state.values()})
    assert steps == [{3}, {3}, {6}]


def test_queues_and_aggregators_are_what_it_takes(tmp_path: Path) -> None:
    inbox: queue.Queue[Any] = queue.Queue()
    round_ = ff.Aggregator()
    model = language_model()
    inbox.put(ff.Adapter.from_peft(language_model(7)))
    trainer = trainer_for(
        model, tmp_path, FlexLoRACallback(inbox.get, round_.add, client="c"), max_steps=-1, num_train_epochs=2
    )
    trainer.train()
    update = round_.finish()
    assert [record.name for record in update.clients] == ["c"] and inbox.empty()
    layer = update.layers[0]
    torch.testing.assert_close(update.delta(layer), ff.Adapter.from_peft(model).delta(layer), rtol=1e-4, atol=1e-5)


def test_examples_are_counted(tmp_path: Path) -> None:
    class Stream(torch.utils.data.IterableDataset[dict[str, Tensor]]):
        def __iter__(self) -> Iterator[dict[str, Tensor]]:
            return iter(rows(40))

    weights: list[float] = []
    callback = FlexLoRACallback(submit=lambda adapter, weight, client: weights.append(weight))
    model = language_model()
    trainer_for(model, tmp_path, callback, data=rows(10), max_steps=-1, num_train_epochs=2).train()
    trainer_for(model, tmp_path, callback, data=rows(16), max_steps=3).train()
    trainer_for(model, tmp_path, callback, data=Stream(), max_steps=3, gradient_accumulation_steps=2).train()
    assert weights == [20, 12, 24]


def test_rounds_see_other_examples_where_torch_is_seeded_anew(tmp_path: Path) -> None:
    """What the callback's docstring warns of: Trainer shuffles by torch's initial seed, alike in each ``train()``."""
    seen: list[int] = []

    class Watched(list[dict[str, Tensor]]):
        def __getitem__(self, index: Any) -> Any:
            seen.append(int(index))
            return super().__getitem__(index)

    trainer = trainer_for(language_model(), tmp_path, FlexLoRACallback(), data=Watched(rows(40)), max_steps=1)
    rounds = []
    for seed in (1, None, 2):
        if seed is not None:
            torch.manual_seed(seed)
        seen.clear()
        trainer.train()
        rounds.append(seen[:4])
    assert rounds[0] == rounds[1] != rounds[2]


def test_another_rank_under_a_trainer_is_refused_and_a_new_one_takes_it(tmp_path: Path) -> None:
    model = language_model()
    before = ff.Adapter.from_peft(model)
    larger = ff.Adapter.from_peft(language_model(7, 4))
    submitted: list[Any] = []
    callback = FlexLoRACallback(lambda: larger, lambda *given, client: submitted.append(given))
    trainer = trainer_for(model, tmp_path, callback)
    with pytest.raises(RankError, match=r"rank 4 was received and the model has 2.*receive\(model, update\) first"):
        trainer.train()
    assert same(before, model) and not submitted
    assert receive(model, larger) is True
    with pytest.raises(AdapterError, match="does not hold its factors"):
        trainer.train()
    assert trainer_for(model, tmp_path, callback).train().training_loss > 0
    assert submitted[0][0].rank(larger.layers[0]) == 4


def test_a_refused_submission_leaves_the_round_as_it_was(tmp_path: Path) -> None:
    """A client whose training went wrong: the refusal names it, and the others go on."""
    policy = ff.RoundPolicy.from_model(language_model(), ranks=(2,), max_weight=100, max_norm=1e3)
    round_ = ff.Aggregator(policy=policy)
    good, bad = language_model(), language_model()
    trainer_for(good, tmp_path, FlexLoRACallback(submit=round_.add, client="good")).train()
    trainer = trainer_for(bad, tmp_path, FlexLoRACallback(submit=round_.add, client="bad"), learning_rate=1e8)
    with pytest.raises(RefusedError, match="'bad'"):
        trainer.train()
    assert round_.clients == ["good"] and [refusal.client for refusal in round_.refused] == ["bad"]
    assert round_.finish().norm > 0


def test_a_journalled_round_is_submitted_to_as_well(tmp_path: Path) -> None:
    model = language_model()
    policy = ff.RoundPolicy.from_model(model, ranks=(2,), max_weight=100)
    with ff.Round.open(tmp_path / "round", policy=policy) as round_:
        trainer_for(model, tmp_path, FlexLoRACallback(submit=round_.add, client="c")).train()
        update = round_.finish()
    assert [record.name for record in update.clients] == ["c"]


def test_a_resumed_run_goes_on_with_the_adapter_of_its_checkpoint(tmp_path: Path) -> None:
    calls: list[None] = []
    model = language_model()
    callback = FlexLoRACallback(lambda: calls.append(None))
    trainer = trainer_for(model, tmp_path, callback, max_steps=2)
    trainer.train()
    trainer._save_checkpoint(model, trial=None)
    halfway = ff.Adapter.from_peft(model)
    again = language_model(5)
    later = trainer_for(again, tmp_path, callback, max_steps=2)
    later.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert len(calls) == 1 and same(halfway, again)


def test_it_works_on_any_peft_model() -> None:
    """Embeddings, convolutions and experts too: the functions know no more of a model than ``load_into``."""
    model, other = trained_adapter(1, 3, kind="mixed"), trained_adapter(2, 3, kind="mixed")
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad])
    model(tokens()).sum().backward()
    optimizer.step()
    assert receive(model, ff.Adapter.from_peft(other), optimizer=optimizer) is False
    assert same(ff.Adapter.from_peft(other), model) and not optimizer.state
