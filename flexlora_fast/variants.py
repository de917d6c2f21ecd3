"""Which configs are plain LoRA, ΔW = s·B·A, and which are refused by name, with the reason and the remedy."""

from __future__ import annotations

from typing import Any

from flexlora_fast.errors import UnsupportedAdapterError

Config = dict[str, Any]

# Initialisations that take s·B0·A0 out of the base weight, so that the update is s(BA − B0A0).
MUTATING_INITS = {"pissa": "PiSSA", "olora": "OLoRA", "corda": "CorDA", "lora_ga": "LoRA-GA"}

_OTHER_INITS = {
    "loftq": "LoftQ (init_lora_weights='loftq') quantises the base weight to fit its own B and A, so clients "
    "have different base weights; aggregate plain LoRA adapters over one quantised base instead",
    "mica": "MiCA (init_lora_weights='mica') freezes B at singular vectors of the base weight, and the B of "
    "an aggregate is not that; train with init_lora_weights=True",
}
_PLAIN_INITS = {"true", "false", "gaussian", "eva", "orthogonal"}

_CONVERT = "retrain with plain LoRA, or convert the adapter on the client with peft.convert_to_lora"
# key in the config -> (name, why ΔW is not s·B·A, remedy)
_VARIANTS: dict[str, tuple[str, str, str]] = {
    "use_dora": (
        "DoRA",
        "its magnitude vector rescales the base weight, which is not linear in B and A",
        _CONVERT,
    ),
    "kasa_config": (
        "KaSA",
        "it truncates the base weight and its update is s·B·diag(d)·A, so clients of different ranks have "
        "different base weights",
        "retrain with plain LoRA",
    ),
    "use_qalora": ("QALoRA", "its A acts on pooled inputs, so B·A has not the shape of the weight", _CONVERT),
    "use_bdlora": (
        "BD-LoRA",
        "its factors are block-diagonal, and the factors of an aggregate would not be",
        "set use_bdlora to None on the clients",
    ),
    "arrow_config": (
        "Arrow",
        "it routes tokens between several adapters, so its update depends on the input",
        "send the single adapters that Arrow routes between",
    ),
    "monteclora_config": (
        "MonteCLoRA",
        "it samples perturbations around A, and the parameters of that distribution are not factors",
        "retrain with plain LoRA",
    ),
    "layer_replication": (
        "layer replication",
        "its layer numbers count replicated layers, so one name means different weights on different clients",
        "expand the base model first and train plain LoRA on it",
    ),
}
# Keys that read like a variant switch but leave ΔW = s·B·A alone; any other such key is unknown to us.
_HARMLESS = {
    "use_rslora",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "loftq_config",
    "megatron_config",
    "velora_config",  # changes the backward pass only (peft/tuners/lora/velora.py)
    "runtime_config",
}


def mutating_init(config: Config) -> str | None:
    """The name of the initialisation that changed the base weight, where undoing it is exact; else
    ``None``.
    """
    init = str(config.get("init_lora_weights")).lower()
    return next((name for prefix, name in MUTATING_INITS.items() if init.startswith(prefix)), None)


def refuse_unsupported(config: Config, client: str | None = None, *, initial: bool = False) -> None:
    """Raise ``UnsupportedAdapterError`` where ΔW is not s·B·A, by name, with the reason and the remedy.

    ``initial=True``: the adapter's initial factors are at hand, so that PiSSA and its like can be undone
    exactly.

    >>> refuse_unsupported({"r": 8, "init_lora_weights": "gaussian"})
    >>> refuse_unsupported({"r": 8, "use_dora": True}, client="hospital-3")
    Traceback (most recent call last):
    ...
    flexlora_fast.errors.UnsupportedAdapterError: client 'hospital-3': DoRA (use_dora): ...
    """
    for key, (name, why, remedy) in _VARIANTS.items():
        if config.get(key):
            raise UnsupportedAdapterError(f"{name} ({key}): {why}; {remedy}", client=client)
    for key, value in config.items():
        if value and key not in _HARMLESS and (key.startswith("use_") or key.endswith("_config")):
            raise UnsupportedAdapterError(
                f"{key}={value!r} is unknown to this version, so that ΔW = s·B·A cannot be relied on; "
                "unset it, or update flexlora_fast",
                client=client,
            )
    _refuse_init(config, client, initial)


def _refuse_init(config: Config, client: str | None, initial: bool) -> None:
    init = config.get("init_lora_weights")
    name = mutating_init(config)
    if name is not None and initial:
        return
    if name is not None:
        raise UnsupportedAdapterError(
            f"{name} (init_lora_weights={init!r}) takes s·B0·A0 out of the base weight, by an amount that "
            "depends on the rank, so the update is s(BA − B0A0); pass the adapter as it was before "
            "training: Adapter.load(path, initial=initial_path)",
            client=client,
        )
    shown = str(init).lower()
    if shown in _OTHER_INITS:
        raise UnsupportedAdapterError(_OTHER_INITS[shown], client=client)
    if init is not None and shown not in _PLAIN_INITS:
        raise UnsupportedAdapterError(
            f"init_lora_weights={init!r} is unknown to this version, so that ΔW = s·B·A cannot be relied on; "
            "train with init_lora_weights=True, or update flexlora_fast",
            client=client,
        )
