"""A worker process: it has the base model once, and puts an adapter into it for each job."""

from __future__ import annotations

import gc
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset, load_from_disk
from torch import Tensor
from transformers import PrinterCallback

from flexlora_fast import live
from flexlora_fast.adapter import Adapter
from flexlora_fast.errors import FlexLoRAError, SimulationError
from flexlora_fast.methods.hetlora import pruned_rank, pruning_penalty
from flexlora_fast.methods.slora import SparseDelta, SparseTuning
from flexlora_fast.simulate.jobs import EvaluateJob, Model, Setup, Sparse, Tested, Trained, TrainJob
from flexlora_fast.simulate.learners import learner_class
from flexlora_fast.simulate.pool import belong, gpus
from flexlora_fast.simulate.processes import settle
from flexlora_fast.simulate.uploads import nbytes, norm, save
from flexlora_fast.tensorfile import TensorFile
from flexlora_fast.truncation import truncated


class Worker:
    """The learner of one process, and the jobs that use it. Every job sets all that its result depends on."""

    def __init__(self, setup: Setup) -> None:
        settle()
        self.setup = setup
        make = learner_class(setup.about.kind)
        self.learner = make(setup.model, setup.lora, setup.about, rank=setup.rank, seed=setup.seed)
        self.scratch = tempfile.TemporaryDirectory()
        self.data: dict[str, Dataset] = {}
        self.loaded: Path | None = None  # the adapter that is in the model, as it is in its folder
        self.based: Path | None = None
        self.pristine: dict[str, Tensor] = {}
        for name, parameter in self.model.named_parameters():
            if "lora_" in name:
                parameter.requires_grad_(any(f"lora_{x}" in name or f"embedding_{x}" in name for x in setup.trains))
        gc.freeze()  # each Trainer.train() runs the garbage collector, half a second over the imported libraries

    @property
    def model(self) -> Any:
        return self.learner.model

    def initial(self, out: Path) -> None:
        """Write the adapter that the learner was made with: the start of everybody."""
        save(Adapter.from_peft(self.model), out)

    def train(self, job: TrainJob) -> Trained:
        """Train a client for one round."""
        started = time.perf_counter()
        self.put(job.model)
        self.loaded = None
        tuning = nullcontext() if job.sparse is None else self.sparse(job.sparse, job.client)
        with tuning, self.penalized():
            output = self.fit(job)
        adapter = self.pruned(Adapter.from_peft(self.model, client=job.client), job.model.adapter)
        save(adapter, job.out)
        size = nbytes(adapter)
        if job.sparse is not None and isinstance(tuning, SparseTuning):
            delta = tuning.delta()
            delta.save(job.sparse.out)
            size = delta.nbytes + sum(extra.nbytes for extra in adapter.extras.values())
        return Trained(
            loss=float(output.training_loss),
            examples=self.setup.training.examples(job.rows[1] - job.rows[0]),
            seconds=time.perf_counter() - started,
            rank=max(adapter.rank(layer) for layer in adapter.layers),
            norm=norm(adapter),
            bytes=size,
        )

    def fit(self, job: TrainJob) -> Any:
        """Have the model trained by a ``Trainer``; what that gives back."""
        # Every round has a new Trainer and with it a new optimizer. It has to: the rank may have changed, and even
        # where it has not, the SVD has turned the basis of the factors, to which Adam's moments belong.
        trainer = self.learner.trainer(self.rows("train", job.rows), self.arguments(job), self.optimizer(job.factor))
        trainer.remove_callback(PrinterCallback)
        return trainer.train()

    def sparse(self, part: Sparse, client: str) -> SparseTuning:
        """Within it the masked entries of base weights train, and the adapter does not."""
        start = None if part.start is None else SparseDelta.load(part.start)
        return SparseTuning(self.model, part.mask, start=start, client=client)

    def pruned(self, adapter: Adapter, start: Path) -> Adapter:
        """The adapter at the rank that HetLoRA's self-pruning leaves it, where the run asks for that."""
        gamma = self.setup.gamma
        if gamma is None:
            return adapter
        rank = pruned_rank(adapter, gamma, Adapter.load(start))
        scales = {layer: adapter.scale(layer) for layer in adapter.layers}
        return truncated(adapter, dict.fromkeys(adapter.layers, rank), scales)

    def evaluate(self, job: EvaluateJob) -> Tested:
        """Test a model."""
        # Outside of inference mode: parameters made in it, as a new rank asks for, could never be trained again.
        self.put(job.model)
        scores = self.learner.evaluate(self.rows(job.part, job.rows), self.setup.batch)
        return Tested(scores.values, scores.loss)

    # -- the model ---

    def put(self, model: Model) -> None:
        """Have the global model in the live one."""
        if model.base != self.based:
            self._set_base(model.base)
        if model.adapter != self.loaded:
            Adapter.load(model.adapter).load_into(self.model)
            self.loaded = model.adapter

    @torch.no_grad()
    def _set_base(self, path: Path | None) -> None:
        """Base weights are what they were as the model was loaded, plus what is in the file: rounded once, not once a
        round.
        """
        layers = live.lora_layers(self.model, "default")
        for layer, weight in self.pristine.items():
            layers[layer].get_base_layer().weight.copy_(weight)
        added = {} if path is None else TensorFile(path)
        for layer in added:
            weight = layers[layer].get_base_layer().weight
            self.pristine.setdefault(layer, weight.detach().clone())
            weight.copy_(weight.float() + added[layer].to(weight.device))
        self.based = path

    # -- training ---

    def rows(self, part: str, span: tuple[int, int]) -> Dataset:
        """Rows of a part of the data, mapped from its files."""
        if part not in self.data:
            self.data[part] = load_from_disk(self.setup.data / part)
        return self.data[part].select(range(*span))

    def arguments(self, job: TrainJob) -> transformers.TrainingArguments:
        training = self.setup.training
        return transformers.TrainingArguments(
            self.scratch.name,
            max_steps=-1 if training.steps is None else training.steps,
            num_train_epochs=1.0 if training.epochs is None else training.epochs,
            per_device_train_batch_size=training.batch,
            max_grad_norm=training.clip,
            lr_scheduler_type="constant",
            seed=job.seed,
            use_cpu=not torch.cuda.is_available(),
            disable_tqdm=True,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            logging_nan_inf_filter=False,  # which would give a client that diverged the loss of its first steps
            dataloader_pin_memory=False,
        )

    def optimizer(self, factor: float) -> torch.optim.Optimizer:
        """A fresh one, with another learning rate for what is no update of base weights: a head starts from nothing."""
        training = self.setup.training
        factors: list[Tensor] = []
        others: list[Tensor] = []
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                (factors if "lora_" in name or "sparse_values" in name else others).append(parameter)
        groups: list[dict[str, Any]] = [{"params": factors, "lr": factor * training.lr}]
        if others:
            groups.append({"params": others, "lr": factor * (training.lr_head or training.lr)})
        if training.optimizer == "sgd":
            return torch.optim.SGD(groups, momentum=training.momentum, weight_decay=training.weight_decay)
        return torch.optim.AdamW(groups, weight_decay=training.weight_decay)

    @contextmanager
    def penalized(self) -> Iterator[None]:
        """Within it the model's loss has HetLoRA's penalty in it, where the run asks for one."""
        gamma, penalty = self.setup.gamma, self.setup.penalty
        if gamma is None or not penalty:
            yield
            return

        def add(model: Any, _: Any, output: Any) -> Any:
            if model.training and output.loss is not None:
                output.loss = output.loss + penalty * pruning_penalty(model, gamma)
            return output

        hook = self.model.register_forward_hook(add)
        try:
            yield
        finally:
            hook.remove()


_worker: Worker | None = None
_failure: Exception | None = None


def start(setup: Setup, taken: Any = None) -> None:
    """Make this process a worker; called once in each. ``taken``: a shared counter of workers, which GPUs go by.

    Raises what is wrong with the model or ``[lora]``; in a process of a pool, its first job does: all that a pool can
    say of an initializer that raised is that a process died.
    """
    global _worker, _failure  # noqa: PLW0603 - what a pool's initializer leaves for its jobs has no other place
    if taken is not None:
        belong(taken)
    elif visible := gpus():  # Trainer would spread a model over all that it sees
        os.environ["CUDA_VISIBLE_DEVICES"] = visible[0]
    try:
        _worker, _failure = Worker(setup), None
    except Exception as error:
        _failure = told(error, setup.model.path)
        if taken is None:
            raise _failure from error


def told(error: Exception, path: str) -> FlexLoRAError:
    """What is said of a model that could not be made."""
    if isinstance(error, FlexLoRAError):
        return error
    return SimulationError(f"model {path!r} cannot be made ({type(error).__name__}: {error}); check [model] and [lora]")


def run(job: TrainJob | EvaluateJob | Path) -> Any:
    """A job in this process; a path asks for the initial adapter there."""
    if _failure is not None:
        raise _failure
    assert _worker is not None
    if isinstance(job, TrainJob):
        return _worker.train(job)
    if isinstance(job, EvaluateJob):
        return _worker.evaluate(job)
    return _worker.initial(job)
