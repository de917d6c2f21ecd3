"""A policy written to a file and read again is the same policy, and a file that is none is refused in words."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

import flexlora_fast as ff
from flexlora_fast.errors import OptionError, RefusedError
from flexlora_fast.gate import RoundPolicy
from tests import hostile, rounds
from tests.rounds import Client

BOUNDS = {"max_weight": 7.5, "max_layer_norm": 1e3, "max_norm": 1e4, "max_extra_norm": 1e3}


def again(policy: RoundPolicy, path: Path) -> RoundPolicy:
    loaded = RoundPolicy.load(policy.save(path / "round" / "policy.json"))
    assert loaded == policy and hash(loaded) == hash(policy) and loaded.to_json() == policy.to_json()
    return loaded


def outcome(policy: RoundPolicy, upload: Any, **options: Any) -> Any:
    """The skeleton and the bits of what is admitted, or what the refusal says."""
    try:
        adapter = policy.admit(upload, client="c", **options)
    except RefusedError as error:
        return str(error), error.code
    s = adapter.skeleton
    values = {key: tensor.reshape(-1).view(torch.uint8).tolist() for key, tensor in adapter.state_dict().items()}
    return s.config, s.specs, s.bias_keys, s.extra_keys, s.ranks, s.scales, s.names, s.forms, values


def encoded(c: Client) -> bytes:
    return save({key: tensor.contiguous() for key, tensor in c.state_dict().items()})


def rich() -> Client:
    """Everything that a reference can have: every kind of layer, a bias of B, heads of other dtypes, tokens."""
    c = rounds.client("ref", "mixed", lora_bias=True, trainable_token_indices=[3, 5], alpha_pattern={"h.0.up": 6})
    extras = {"head.weight": torch.ones(3, 2), "count": torch.ones(2, dtype=torch.int64), "one": torch.tensor(1.5)}
    return c.but(bias={"h.0.up": torch.ones(29)}, extras=extras)


@pytest.mark.parametrize("scale", ["alpha", "constant", lambda layer, rank: ord(layer[0]) / rank**0.5])
def test_everything_that_a_reference_has(scale: Any, tmp_path: Path) -> None:
    c = rich()
    policy = RoundPolicy.from_adapter(c.adapter(), ranks=range(1, 9), scale=scale, dtypes=(torch.float32,), **BOUNDS)
    loaded = again(policy, tmp_path)
    assert loaded.reference == policy.reference and loaded.config == policy.config
    assert (loaded.max_bytes, loaded.max_config_bytes, loaded.dtypes) == (
        policy.max_bytes,
        policy.max_config_bytes,
        policy.dtypes,
    )
    for layer in policy.specs:
        assert [loaded.scale(layer, rank) for rank in range(1, 9)] == [policy.scale(layer, r) for r in range(1, 9)]
    sent = [
        rounds.client("a", "mixed", rank=2, lora_bias=True).but(bias=c.bias, extras=c.extras),
        c,
        c.but(bias={}),
        c.but(extras=c.extras | {"count": torch.ones(2, dtype=torch.int32)}),
        c.but(extras=c.extras | {"head.weight": torch.ones(2, 2)}),
        rounds.client("a", "mixed", dtype=torch.bfloat16).but(bias=c.bias, extras=c.extras),
        c.mapped(lambda _, A, B: (A * 1e9, B)),
    ]
    for client in sent:
        assert outcome(loaded, encoded(client)) == outcome(policy, encoded(client))
    assert all(len(outcome(loaded, encoded(client))) > 2 for client in sent[:2])
    codes = [outcome(loaded, encoded(client))[1] for client in sent[2:]]
    assert codes == ["missing-tensor", "dtype", "shape", "dtype", "norm"]


@pytest.mark.parametrize("model", rounds.MODELS)
def test_every_kind_of_layer(model: str, tmp_path: Path) -> None:
    for c in rounds.patterned(model):
        policy = RoundPolicy.from_adapter(c.adapter(), ranks=range(1, 9))
        assert outcome(again(policy, tmp_path), encoded(c)) == outcome(policy, encoded(c))


def test_both_refuse_the_hostile_files_alike(tmp_path: Path) -> None:
    policy = RoundPolicy.from_adapter(hostile.reference().adapter(), ranks=(2, 4), **BOUNDS)
    loaded = again(policy, tmp_path)
    for name, (make, code) in hostile.WEIGHTS.items():
        content = make()
        assert outcome(loaded, content) == outcome(policy, content), name
        assert outcome(loaded, content)[1] == code, name
    for name, (config, code) in hostile.CONFIGS.items():
        assert outcome(loaded, encoded(hostile.reference()), config=config)[1] == code, name
    for i, (name, (make_at, code)) in enumerate(hostile.PATHS.items()):
        (tmp_path / str(i)).mkdir()
        upload = make_at(tmp_path / str(i) / "client")
        assert outcome(loaded, upload)[1] == outcome(policy, upload)[1] == code, name


def test_policies_are_equal_where_they_admit_the_same() -> None:
    def policy(c: Client | None = None, **rules: Any) -> RoundPolicy:
        return RoundPolicy.from_adapter((c or hostile.reference()).adapter(), **{"ranks": (2, 4, 3), **rules})

    base = policy()
    assert base == policy(ranks=range(2, 5)) == policy(ranks=[4, 3, 2]) == policy(max_bytes=base.max_bytes)
    assert policy(scale=lambda _, r: 8 / r) == policy(scale=lambda _, r: 8.0 / r)
    others = [
        policy(ranks=(2, 4)),
        policy(scale="constant"),
        policy(max_weight=2.0),
        policy(max_layer_norm=1.0),
        policy(max_norm=1.0),
        policy(max_extra_norm=1.0),
        policy(max_bytes=1000),
        policy(dtypes=(torch.float32,)),
        policy(scale=lambda _, r: 1 / r),
        policy(hostile.reference().but(extras={"head.weight": torch.ones(2, 3)})),
        policy(rounds.client("ref", rank=4, alpha=9)),
        policy(rounds.client("ref", rank=4, base_model_name_or_path="other")),
    ]
    assert all(base != other for other in others)
    assert base != "a policy" and base.to_json()["format"] == "flexlora_fast.policy/1"


def test_a_document_is_a_copy() -> None:
    policy = RoundPolicy.from_adapter(hostile.reference().adapter(), ranks=(4,))
    policy.to_json()["reference"]["config"]["target_modules"].clear()
    assert policy.config["target_modules"]


def test_a_scale_beyond_any_number_cannot_be_stored() -> None:
    policy = RoundPolicy.from_adapter(
        hostile.reference().adapter(), ranks=(4,), scale=lambda _, rank: float("nan") * rank
    )
    with pytest.raises(OptionError, match="gives nan for rank 4 of layer"):
        policy.to_json()


def test_a_table_of_scales_has_no_others(tmp_path: Path) -> None:
    c = hostile.reference()
    policy = RoundPolicy.from_adapter(c.adapter(), ranks=(2, 4), scale=lambda _, r: 8 / r)
    with pytest.raises(OptionError, match="no scale for rank 3"):
        again(policy, tmp_path).scale("h.0.up", 3)


def _set(*path: Any, to: Any) -> Callable[[Any], Any]:
    def change(document: Any) -> Any:
        inner = document
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = to
        return document

    return change


LAYER = ("reference", "layers", 0)
BROKEN: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a list": (lambda _: [], "not an object"),
    "another version": (_set("format", to="flexlora_fast.policy/2"), "its format is"),
    "no format": (lambda d: {k: v for k, v in d.items() if k != "format"}, "its format is None"),
    "more": (_set("x", to=1), "the difference is x"),
    "less": (lambda d: {k: v for k, v in d.items() if k != "max_norm"}, "the difference is max_norm"),
    "no ranks": (_set("ranks", to=[]), "ranks"),
    "a rank of 0": (_set("ranks", to=[0]), "ranks"),
    "a rank of true": (_set("ranks", to=[True]), "ranks"),
    "a rank twice": (_set("ranks", to=[4, 4]), "ranks"),
    "a rank of lists": (_set("ranks", to=[[4]]), "ranks"),
    "another rule": (_set("scale", to="beta"), "'alpha', 'constant'"),
    "scales of other layers": (_set("scale", to={"x": [1.0, 2.0]}), "scale has layers"),
    "scales of other ranks": (
        lambda d: d | {"scale": {name: [1.0] for name in ("h.0.down", "h.0.up", "h.1.down", "h.1.up")}},
        "one number for each",
    ),
    "a scale of text": (
        lambda d: d | {"scale": {name: ["1", 2] for name in ("h.0.down", "h.0.up", "h.1.down", "h.1.up")}},
        "not a number",
    ),
    "dtypes of text": (_set("dtypes", to="F32"), "dtypes"),
    "a dtype of lists": (_set("dtypes", to=[["F32"]]), "dtype"),
    "a dtype of integers": (_set("dtypes", to=["I64"]), "none that factors have"),
    "no dtype": (_set("dtypes", to=[]), "dtypes"),
    "a bound of 0": (_set("max_norm", to=0), "max_norm"),
    "a bound of text": (_set("max_norm", to="1"), "max_norm"),
    "a bound of true": (_set("max_weight", to=True), "max_weight"),
    "bytes of half": (_set("max_bytes", to=1.5), "max_bytes"),
    "reference of text": (_set("reference", to="x"), "reference is a str"),
    "config of text": (_set("reference", "config", to="x"), "config"),
    "config with a bad alpha": (_set("reference", "config", "lora_alpha", to="16"), "lora_alpha"),
    "config of DoRA": (_set("reference", "config", "use_dora", to=True), "DoRA"),
    "no layer": (_set("reference", "layers", to=[]), "no layer"),
    "layers of text": (_set("reference", "layers", to="x"), "a layer is a"),
    "a layer twice": (lambda d: d["reference"]["layers"].append(d["reference"]["layers"][0]) or d, "occurs twice"),
    "a layer's tensor twice": (_set(*LAYER, "spec", "b_key", to=hostile.A), "occurs twice"),
    "a kind of tomorrow": (_set(*LAYER, "spec", "kind", to="quantum"), "kind"),
    "m of 0": (_set(*LAYER, "spec", "m", to=0), "m of a layer"),
    "a tail of text": (_set(*LAYER, "spec", "a_shape_tail", to="2"), "a_shape_tail"),
    "a layer's spec with more": (_set(*LAYER, "spec", "x", to=0), "the difference is x"),
    "a scale of null": (_set(*LAYER, "scale", to=None), "scale of layer"),
    "a bias of a number": (_set(*LAYER, "bias_key", to=3), "bias_key"),
    "extras of lists": (_set("reference", "extras", to=[]), "extras is a list"),
    "an extra of another dtype": (_set("reference", "extras", "y", to={"shape": [1], "dtype": "Q4"}), "dtype 'Q4'"),
    "an extra of a bad shape": (_set("reference", "extras", "y", to={"shape": [False], "dtype": "F32"}), "shape"),
}


@pytest.mark.parametrize(("change", "says"), BROKEN.values(), ids=BROKEN.keys())
def test_a_document_that_is_none(change: Any, says: str) -> None:
    good = RoundPolicy.from_adapter(hostile.reference().adapter(), ranks=(2, 4)).to_json()
    with pytest.raises(OptionError) as caught:
        RoundPolicy.from_json(change(json.loads(json.dumps(good))))
    assert says in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b'{"a": 1, "a": 2}', b'{"a": NaN}', b"[" * 10**5], ids=repr)
def test_a_file_that_is_no_document(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "p.json").write_bytes(content)
    with pytest.raises(OptionError, match=r"p\.json.*cannot be read"):
        RoundPolicy.load(tmp_path / "p.json")
    with pytest.raises(OptionError, match="cannot be read"):
        RoundPolicy.load(tmp_path / "nothing.json")


def test_a_round_under_a_loaded_policy(tmp_path: Path) -> None:
    policy = RoundPolicy.from_adapter(hostile.reference().adapter(), ranks=(2, 4))
    updates = []
    for each in (policy, again(policy, tmp_path)):
        agg = ff.Aggregator(policy=each)
        agg.add(encoded(hostile.reference()), client="a")
        updates.append(agg.finish())
    assert all(torch.equal(updates[0][layer].S, updates[1][layer].S) for layer in updates[0].layers)
