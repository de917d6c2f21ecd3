"""In a Hugging Face training loop: what the server sent goes into the model, what was trained comes out.

Two functions, and a ``TrainerCallback`` that calls them when a ``Trainer`` (or trl's ``SFTTrainer``) begins and ends.
The optimizer is what makes this delicate: it holds the parameters it was made with, so that a layer of another rank,
which has new parameters, would never be trained again; and the SVD of a round turns the basis of the factors, so that
Adam's moments, which ``Trainer`` keeps from one ``train()`` to the next, belong to directions that are no longer there.

Every process of a distributed run must be given the same update: broadcasting it (``broadcast_object_list`` of
``accelerate.utils``) is the loop's part. Each process puts it into its own copy of the model; the main one submits.
Factors that FSDP shards, and optimizers that do not hold them as they are (DeepSpeed's), are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from flexlora_fast import live
from flexlora_fast.adapter import Adapter
from flexlora_fast.errors import AdapterError, OptionError, RankError
from flexlora_fast.update import GlobalUpdate

try:
    from transformers import TrainerCallback
except ImportError as missing:
    raise ImportError(f"{missing}; install it with `pip install 'flexlora_fast[peft]'`") from missing

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments


class Submit(Protocol):
    """``Aggregator.add``, ``Round.add``, or a function that sends an adapter away."""

    def __call__(self, adapter: Adapter, weight: float, /, *, client: Any) -> object: ...


def receive(
    model: Any,
    update: Adapter | GlobalUpdate,
    rank: int | None = None,
    optimizer: Any = None,
    adapter_name: str = "default",
) -> bool:
    """Put what the server sent into a live PEFT model.

    A round's update of a method that ``merges`` (FLoRA, FedEx-LoRA) also goes into the frozen weights
    (``GlobalUpdate.merge_into``): give each round's once, in order, to every client, also to those that did not take
    part. Checkpoints of adapters do not hold what was added to the base model.

    Args:
        model: as ``get_peft_model`` returned it, or wrapped by DistributedDataParallel or ``torch.compile``.
        update: an adapter for this client, or the round's update, cut to the ranks that the model has now.
        rank: with a ``GlobalUpdate``, the rank of all layers instead.
        optimizer: the one that goes on with the model's parameters, where there is one. No rank may change then, and
            its state of each A and B that is overwritten is dropped, for the optimizer to begin anew there. Heads and
            biases, which are averaged in a basis that stays, keep theirs.

    Returns:
        True where the rank of a layer changed: make a new optimizer (and ``Trainer``) then.

    Raises:
        RankError: a rank would change under the optimizer, or under DistributedDataParallel. OptionError: ``rank`` with
            an adapter, which has its own.
        AdapterError or a subclass: what ``Adapter.load_into`` refuses, or an optimizer of other parameters than the
        model's. All of it before anything is written.
    """
    wrapped, model = model, _unwrapped(model)
    _refuse_sharded(model, adapter_name)
    adapter = _adapter_for(model, update, rank, adapter_name)
    if optimizer is not None:
        _check_optimizer(optimizer, model, adapter_name)
    holder = "optimizer" if optimizer is not None else _parallel(wrapped)
    if holder is not None:
        _refuse_new_ranks(adapter, live.ranks(model, adapter_name), holder)
    if isinstance(update, GlobalUpdate) and any(layer.merges for layer in update.values()):
        update.merge_into(model, adapter_name)
    before = {layer: [p.detach().clone() for p in pair] for layer, pair in _factors(model, adapter_name).items()}
    rebuilt = adapter.load_into(model, adapter_name)
    if optimizer is not None:
        for layer, pair in _factors(model, adapter_name).items():
            if any(not torch.equal(now, then) for now, then in zip(pair, before[layer], strict=True)):
                for parameter in pair:
                    optimizer.state.pop(parameter, None)
    return rebuilt


def submit(model: Any, to: Submit, weight: float, client: str | None = None, adapter_name: str = "default") -> Adapter:
    """Hand a snapshot of a live PEFT model's adapter to ``to(adapter, weight, client=client)``, and return it.

    ``to`` is ``Aggregator.add``, ``Round.add``, or a function that sends it away. Raises what ``Adapter.from_peft`` and
    ``to`` raise.
    """
    adapter = Adapter.from_peft(_unwrapped(model), adapter_name, client)
    to(adapter, weight, client=client)
    return adapter


class FlexLoRACallback(TrainerCallback):
    """Receives when a ``Trainer`` begins to train and submits when it ends.

    Args:
        receive: called without arguments when training begins, after the optimizer was made; what it returns, an
            adapter or a round's update, goes into the model as in :func:`receive`, at the ranks that the model has.
            None: nothing came. ``queue.get`` is such a function. It is not called where training is resumed from a
            checkpoint, which has the adapter of this round.
        submit: called as ``submit(adapter, weight, client=client)`` when training ends, on the main process only, such
            as ``Aggregator.add`` or ``Round.add``. The weight is the number of examples trained on.
        client: the name to submit under. adapter_name: of the adapter in the model.

    ``Trainer`` shuffles its data by torch's initial seed, anew in each ``train()``: a round of less than an epoch sees
    the examples of the last one again, unless ``torch.manual_seed`` is called with another seed before.

    What they raise ends ``Trainer.train``: a rank that changes (``RankError``: give it to :func:`receive` before a new
    ``Trainer`` is made), an adapter that does not fit, a submission that the server refuses.

    >>> import flexlora_fast as ff
    >>> round_ = ff.Aggregator(rank=8)
    >>> callback = FlexLoRACallback(receive=lambda: None, submit=round_.add, client="hospital-3")
    """

    def __init__(
        self,
        receive: Callable[[], Adapter | GlobalUpdate | None] | None = None,
        submit: Submit | None = None,
        *,
        client: str | None = None,
        adapter_name: str = "default",
    ) -> None:
        self.receive, self.submit = receive, submit
        self.client, self.adapter_name = client, adapter_name

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        # Also where nothing comes: a rank changed under an old Trainer, which would train what nobody uses.
        _check_optimizer(optimizer, _unwrapped(model), self.adapter_name)
        resumed = state.global_step > 0
        update = None if self.receive is None or resumed else self.receive()
        if update is not None:
            receive(model, update, optimizer=optimizer, adapter_name=self.adapter_name)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        if self.submit is not None and state.is_world_process_zero:
            weight = _examples(args, state, train_dataloader)
            submit(model, self.submit, weight, self.client, self.adapter_name)


# -- the model and its optimizer ---


def _unwrapped(model: Any) -> Any:
    """The PEFT model within DistributedDataParallel and ``torch.compile``."""
    from accelerate.utils import extract_model_from_parallel

    return extract_model_from_parallel(model, keep_torch_compile=False)


def _factors(model: Any, adapter_name: str) -> dict[str, tuple[Tensor, Tensor]]:
    """The live A and B of each layer."""
    return {
        layer: live.parameters(module, adapter_name)[:2]
        for layer, module in live.lora_layers(model, adapter_name).items()
    }


def _refuse_sharded(model: Any, adapter_name: str) -> None:
    from torch.distributed.tensor import DTensor

    for layer, pair in _factors(model, adapter_name).items():
        if any(isinstance(parameter, DTensor) for parameter in pair):
            raise AdapterError("its factors are sharded (FSDP); use DistributedDataParallel", layer=layer)


def _check_optimizer(optimizer: Any, model: Any, adapter_name: str) -> None:
    groups = getattr(optimizer, "param_groups", [])  # a stand-in of DeepSpeed's has none
    held = {id(parameter) for group in groups for parameter in group["params"]}
    for layer, pair in _factors(model, adapter_name).items():
        if any(parameter.requires_grad and id(parameter) not in held for parameter in pair):
            raise AdapterError(
                "the optimizer does not hold its factors, which would never be trained: a rank changed since it was "
                "made (make a new Trainer), or FSDP or DeepSpeed shard them (use DistributedDataParallel)",
                layer=layer,
            )


def _parallel(model: Any) -> str | None:
    """What holds the model's parameters beside the model, where it is wrapped so: it would sum up old ones' gradients,
    and each process would go its own way.
    """
    from torch.nn.parallel import DistributedDataParallel

    while model is not None:
        if isinstance(model, DistributedDataParallel):
            return "DistributedDataParallel"
        model = getattr(model, "_orig_mod", None)  # torch.compile
    return None


def _refuse_new_ranks(adapter: Adapter, now: Mapping[str, int], holder: str) -> None:
    for layer in adapter.layers:
        if layer in now and adapter.rank(layer) != now[layer]:
            raise RankError(
                f"rank {adapter.rank(layer)} was received and the model has {now[layer]}, whose parameters the "
                f"{holder} already holds; call integrations.transformers.receive(model, update) first, with the bare "
                "model, and make a new Trainer then, or have the update sent at the model's ranks",
                client=adapter.client,
                layer=layer,
            )


def _adapter_for(model: Any, update: Adapter | GlobalUpdate, rank: int | None, adapter_name: str) -> Adapter:
    if isinstance(update, Adapter):
        if rank is not None:
            raise OptionError(f"rank={rank} goes with a GlobalUpdate; this adapter has the ranks that it was cut to")
        return update
    if not isinstance(update, GlobalUpdate):
        raise OptionError(f"a {type(update).__name__} was received; it must be an Adapter or a GlobalUpdate")
    config = live.config(model, adapter_name)
    if rank is not None:
        config |= {"r": rank, "rank_pattern": {}}
    return update.adapter(config=config)


def _examples(args: TrainingArguments, state: TrainerState, dataloader: Any) -> float:
    """How many examples were trained on, over all processes and epochs."""
    try:
        return float(round((state.epoch or 0.0) * len(dataloader.dataset)))
    except TypeError:  # a stream of unknown length
        batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        return float(state.global_step * batch)
