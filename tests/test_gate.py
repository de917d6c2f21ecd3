"""The gate: what a policy lets in equals what ``Adapter.load`` reads, and a round under a policy goes on without those
it refuses.
"""

from __future__ import annotations

import gc
import json
import math
import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

import flexlora_fast as ff
from flexlora_fast.errors import AdapterError, FlexLoRAError, OptionError, RefusedError, WeightError, shown
from flexlora_fast.gate import Reason, RoundPolicy
from flexlora_fast.storage import load as load_update
from tests import models, rounds
from tests.checks import assert_identical
from tests.rounds import Client

RANKS = range(1, 9)


def policy_for(c: Client, **rules: Any) -> RoundPolicy:
    """The policy of a round that asks for exactly what this client trained."""
    return RoundPolicy.from_adapter(c.adapter(), **{"ranks": RANKS, "max_weight": 10.0, **rules})


def saved(c: Client, path: Path) -> Path:
    c.adapter().save(path)
    return path


def assert_same_adapter(one: ff.Adapter, two: ff.Adapter) -> None:
    """Layers, ranks, scales, forms and bits."""
    a, b = one.skeleton, two.skeleton
    assert (a.specs, a.bias_keys, a.extra_keys, a.ranks) == (b.specs, b.bias_keys, b.extra_keys, b.ranks)
    assert (a.scales, a.forms) == (b.scales, b.forms)
    for key, tensor in two.state_dict().items():
        assert one.state_dict()[key].dtype == tensor.dtype and torch.equal(one.state_dict()[key], tensor)


# -- what is let in ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model", rounds.MODELS)
def test_good_adapters_of_every_kind_equal_what_load_reads(model: str, dtype: torch.dtype, tmp_path: Path) -> None:
    for c in rounds.typical(model) + rounds.patterned(model):
        folder = saved(rounds.client(c.name, model).but(config=c.config, factors=c.factors), tmp_path / c.name)
        policy = policy_for(rounds.client("ref", model), scale=lambda layer, _, c=c: c.scales[layer])
        for spool in (None, tmp_path):
            assert_same_adapter(policy.admit(folder, client="x", spool=spool), ff.Adapter.load(folder))
    half = saved(rounds.client("half", model, dtype=dtype), tmp_path / "half")
    assert_same_adapter(policy_for(rounds.client("ref", model)).admit(half, client="x"), ff.Adapter.load(half))


@pytest.mark.parametrize("kind", models.KINDS)
def test_what_peft_saves_is_admitted_and_loads_again(kind: str, tmp_path: Path) -> None:
    policy = RoundPolicy.from_model(models.trained_adapter(0, 4, kind=kind), ranks=(2, 4), scale="constant")
    client = models.trained_adapter(1, 2, kind=kind)  # alpha = 2r, so s = 2 as in the reference
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        client.save_pretrained(tmp_path / "in", save_embedding_layers=False)
    adapter = policy.admit(tmp_path / "in", client="x")
    assert_same_adapter(adapter, ff.Adapter.from_peft(client))
    adapter.save(tmp_path / "out")
    torch.testing.assert_close(models.outputs(models.reload(tmp_path / "out")), models.outputs(client))


def test_heads_biases_and_tokens_are_part_of_it(tmp_path: Path) -> None:
    c = rounds.client("a", lora_bias=True, bias="all", modules_to_save=["head"], trainable_token_indices=[3, 5])
    c = c.but(bias={"h.0.up": torch.ones(29)}, extras={"head.weight": torch.ones(3, 2), "count": torch.ones(2).long()})
    folder = saved(c, tmp_path / "a")
    adapter = policy_for(c).admit(folder, client="a")
    assert_same_adapter(adapter, ff.Adapter.load(folder))
    assert adapter.config["trainable_token_indices"] == [3, 5] and adapter.config["modules_to_save"] == ["head"]


def test_the_config_is_the_servers_own(tmp_path: Path) -> None:
    """Nothing of a client's config stays: not its targets (regular expressions in PEFT), not what nobody knows."""
    c = rounds.client("a", rank=2)
    evil = c.config | {"target_modules": "(a+)+$", "exclude_modules": "(b+)+$", "auto_mapping": "x", "revision": "y"}
    folder = saved(c, tmp_path / "a")
    (folder / "adapter_config.json").write_text(json.dumps(evil))
    adapter = policy_for(rounds.client("ref", rank=4)).admit(folder, client="a")
    assert adapter.config["r"] == 2 and adapter.config["target_modules"] == c.config["target_modules"]
    assert "auto_mapping" not in adapter.config and "revision" not in adapter.config


def test_patterns_of_a_client_are_read_as_names(tmp_path: Path) -> None:
    """Whole names, ends of names, and what this package writes itself (anchored, escaped); the first match counts."""
    c = rounds.client("a", rank=2, rank_pattern={"h.0.up": 5, "h.1.down": 3})
    written = saved(c, tmp_path / "a")
    for patterns in (
        {"h.0.up": 5, "h.1.down": 3},
        {"0.up": 5, "1.down": 3},
        {r"^h\.0\.up": 5, r"^h\.1\.down": 3},
        {"h.0.up": 5, "0.up": 7, "up": 2, "1.down": 3, "^down": 8, "nothing": 8},
    ):
        config = c.config | {"rank_pattern": patterns}
        (written / "adapter_config.json").write_text(json.dumps(config))
        admitted = policy_for(c).admit(written, client="a")
        assert admitted.skeleton.ranks == ff.Adapter.load(written).skeleton.ranks == c.adapter().skeleton.ranks


def test_scale_rules(tmp_path: Path) -> None:
    """The alpha of the reference, its scale, or a function: what the client is held to, and what it gets."""
    ref = rounds.client("ref", rank=4, alpha=8)
    for rule, alpha, s in (("alpha", 8, 4.0), ("constant", 4, 2.0), (lambda _, r: 3.0 / r, 3, 1.5)):
        folder = saved(rounds.client("c", rank=2, alpha=alpha), tmp_path / str(alpha))
        policy = policy_for(ref, scale=rule)
        assert policy.admit(folder, client="c").scale("h.0.up") == s
        assert policy.admit((folder / "adapter_model.safetensors"), client="c").scale("h.0.up") == s
        other = policy_for(ref, scale=lambda layer, rank, s=s: 1.01 * s)
        with pytest.raises(RefusedError, match="its scale is") as caught:
            other.admit(folder, client="c")
        assert caught.value.code == Reason.SCALE
    rslora = rounds.client("ref", rank=4, alpha=8, rslora=True)
    assert policy_for(rslora).scale("h.0.up", 16) == 2.0


def test_bytes_files_and_folders_are_the_same_upload(tmp_path: Path) -> None:
    c = rounds.client("a")
    policy, folder = policy_for(c), saved(c, tmp_path / "a")
    file, config = folder / "adapter_model.safetensors", (folder / "adapter_config.json").read_bytes()
    expected = ff.Adapter.load(folder)
    for upload in (folder, str(folder), file, file.read_bytes()):
        assert_same_adapter(policy.admit(upload, client="x"), expected)
    assert_same_adapter(policy.admit(file.read_bytes(), client="x", config=config), expected)
    with pytest.raises(RefusedError) as caught:
        policy.admit(file.read_bytes(), client="x", config=config.replace(b'"r": 4', b'"r": 5'))
    assert caught.value.code == Reason.CONFIG_RANK


def test_a_policy_from_shapes_equals_one_from_an_adapter(tmp_path: Path) -> None:
    c = rounds.client("a", rank=2).but(extras={"head.weight": torch.ones(3, 2)})
    shapes = {name: (layer.m, layer.n) for name, layer in c.layers.items()}
    policy = RoundPolicy.from_config(rounds.client("b").config, shapes, {"head.weight": (3, 2)}, ranks=(2,))
    assert policy.specs == policy_for(c).specs
    folder = saved(c, tmp_path / "a")
    assert_same_adapter(policy.admit(folder, client="a"), ff.Adapter.load(folder))
    assert RoundPolicy.from_adapter(folder, ranks=(2,)).specs == policy.specs


# -- copies ---


def test_a_copy_is_private_and_what_happens_to_the_upload_later_has_no_effect(tmp_path: Path) -> None:
    c, spool = rounds.client("../../etc/passwd"), tmp_path / "spool"
    spool.mkdir()
    folder = saved(c, tmp_path / "a")
    expected = ff.Adapter.load(folder).in_memory()
    kept, inside = policy_for(c).admit(folder, client=c.name, spool=spool), policy_for(c).admit(folder, client=c.name)
    os.truncate(folder / "adapter_model.safetensors", 10)
    assert_same_adapter(kept, expected)
    assert_same_adapter(inside, expected)
    assert not inside.on_disk and kept.on_disk
    (copy,) = spool.iterdir()
    assert copy.stat().st_mode & 0o777 == 0o600 and "passwd" not in copy.name


def test_of_a_refused_client_nothing_stays(tmp_path: Path) -> None:
    c, spool = rounds.client("a").mapped(lambda _, A, B: (A * math.nan, B)), tmp_path / "spool"
    spool.mkdir()
    folder = saved(c, tmp_path / "a")
    gc.collect()  # what tests before this one left
    before = len(os.listdir("/proc/self/fd"))
    for where in (spool, None):
        with pytest.raises(RefusedError):
            policy_for(c).admit(folder, client="a", spool=where)
    gc.collect()
    assert not list(spool.iterdir()) and len(os.listdir("/proc/self/fd")) == before


def test_a_file_that_changes_while_it_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checked header and copied header must be one; a file cut short is noticed as well."""
    c, spool = rounds.client("a"), tmp_path / "spool"
    spool.mkdir()
    folder, policy = saved(c, tmp_path / "a"), policy_for(c)
    file = folder / "adapter_model.safetensors"
    content, skeleton = file.read_bytes(), policy._skeleton
    for new in (content.replace(b"up.lora_A", b"pu.lora_A"), content[:-1]):
        file.write_bytes(content)

        def swap(*args: Any, new: bytes = new) -> Any:
            file.write_bytes(new)
            return skeleton(*args)

        monkeypatch.setattr(policy, "_skeleton", swap)
        with pytest.raises(RefusedError) as caught:
            policy.admit(folder, client="a", spool=spool)
        assert caught.value.code == Reason.CHANGED and not list(spool.iterdir())


# -- rounds ---


def started(policy: RoundPolicy | None, **options: Any) -> ff.Aggregator:
    return ff.Aggregator(policy=policy, **options)


@pytest.mark.parametrize("read", ["add", "finish"])
def test_a_round_under_a_policy_is_the_round_without_those_it_refuses(read: Any, tmp_path: Path) -> None:
    good = [rounds.client(f"c{i}", rank=i, seed=i) for i in (1, 2, 4)]
    policy = policy_for(rounds.client("ref"), max_layer_norm=1e3)
    bad: dict[str, tuple[Any, str]] = {
        "nan": (saved(rounds.client("nan").mapped(lambda _, A, B: (A, B * math.nan)), tmp_path / "nan"), "not-finite"),
        "big": (rounds.client("big").mapped(lambda _, A, B: (A, B * 1e6)).adapter(), "norm"),
        "dora": (saved(rounds.client("dora"), tmp_path / "dora"), "unsupported"),
        "junk": (b"junk" * 10, "header"),
        "rank": (rounds.client("rank", rank=9).adapter(), "rank"),
        "alpha": (rounds.client("alpha", alpha=9).adapter(), "scale"),
        "base": (rounds.client("base", base_model_name_or_path="other").adapter(), "base"),
        "c2": (rounds.client("c2").adapter(), "incompatible"),  # the name is taken
        "heavy": (rounds.client("heavy").adapter(), "weight"),
    }
    config = json.loads((tmp_path / "dora" / "adapter_config.json").read_text()) | {"use_dora": True}
    (tmp_path / "dora" / "adapter_config.json").write_text(json.dumps(config))
    agg, plain = started(policy, read=read), started(None, read=read)
    agg.add(saved(good[0], tmp_path / "c1"), 2.0, client="c1")
    agg.add((saved(good[1], tmp_path / "c2") / "adapter_model.safetensors").read_bytes(), 3.0, client="c2")
    for name, (upload, _) in bad.items():
        with pytest.raises((RefusedError, AdapterError)) as caught:
            agg.add(upload, 11.0 if name == "heavy" else 1.0, client=name)
        assert caught.value.client == name
    agg.add(good[2].adapter(), 4.0, client="c4")
    assert {r.client: r.code for r in agg.refused} == {name: code for name, (_, code) in bad.items()}
    for c, weight in zip(good, (2.0, 3.0, 4.0), strict=True):
        plain.add(c.adapter(), weight, client=c.name)
    update = agg.finish()
    assert_identical(update, plain.finish())
    assert [r.code for r in update.refused] == [code for _, code in bad.values()]


def test_the_rounds_own_copies_go_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "tmp").mkdir()
    c = rounds.client("a")
    agg = started(policy_for(c), read="finish")
    agg.add(saved(c, tmp_path / "a"), client="a")
    with pytest.raises(FlexLoRAError):
        agg.add(saved(c, tmp_path / "a"), client="a")
    (folder,) = (tmp_path / "tmp").iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700 and len(list(folder.iterdir())) == 1
    update = agg.finish()
    del agg
    gc.collect()
    assert not list((tmp_path / "tmp").iterdir())
    assert_same_adapter(update.adapter(client="a"), update.adapter(client="a"))


def test_an_own_spool_keeps_the_accepted_alone(tmp_path: Path) -> None:
    spool = tmp_path / "spool"
    spool.mkdir()
    agg = started(policy_for(rounds.client("ref")), spool=spool)
    agg.add(saved(rounds.client("a"), tmp_path / "a"), client="a")
    # Fits the policy, but not a client that came in memory: refused after the copy was made.
    agg._admission._agreed["base_model_name_or_path"] = ("other", "z")
    with pytest.raises(AdapterError):
        agg.add(tmp_path / "a", client="b")
    assert len(list(spool.iterdir())) == 1 and (tmp_path / "a").is_dir()


def test_without_a_policy_bytes_are_refused_and_a_spool_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="give the round a policy"):
        started(None).add(b"", client="a")
    with pytest.raises(OptionError, match="there is no policy"):
        started(None, spool=tmp_path)


def test_codes_outlive_a_saved_update(tmp_path: Path) -> None:
    agg = started(policy_for(rounds.client("a")))
    agg.add(rounds.client("a").adapter(), client="a")
    with pytest.raises(WeightError):
        agg.add(rounds.client("b").adapter(), weight=-1, client="b")
    agg.finish(tmp_path / "u.safetensors")
    assert load_update(tmp_path / "u.safetensors").refused == agg.refused
    assert agg.finish().report().to_dict()["refused"][0]["code"] == "weight"


# -- errors and mistakes of the server ---


def test_a_refusal_carries_its_parts_and_survives_pickling() -> None:
    c = rounds.client("hospital-3", rank=9)
    with pytest.raises(RefusedError) as caught:
        policy_for(rounds.client("ref")).check(c.adapter(), client=c.name)
    for error in (caught.value, pickle.loads(pickle.dumps(caught.value))):
        assert (error.code, error.client, error.value) == ("rank", "hospital-3", "9")
        assert error.layer in c.layers and error.remedy in str(error) and "hospital-3" in str(error)


@pytest.mark.parametrize(
    "rules",
    [
        {"ranks": ()},
        {"ranks": (0, 4)},
        {"ranks": (True,)},
        {"ranks": ("8",)},
        {"scale": "beta"},
        {"dtypes": ()},
        {"dtypes": (torch.int8,)},
        {"max_weight": 0},
        {"max_weight": math.nan},
        {"max_norm": -1.0},
        {"max_layer_norm": "1"},
        {"max_extra_norm": True},
        {"max_bytes": 1.5},
    ],
    ids=str,
)
def test_rules_that_no_server_can_mean(rules: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(rules))):
        policy_for(rounds.client("a"), **rules)


@pytest.mark.parametrize("client", [3, "", None, b"x"])
def test_a_client_needs_a_name(client: Any) -> None:
    with pytest.raises(RefusedError) as caught:
        policy_for(rounds.client("a")).admit(b"", client=client)
    assert caught.value.code == Reason.NAME


@pytest.mark.parametrize("weight", [-1, math.nan, math.inf, 10.5, 10**400, True, "1", None], ids=str)
def test_weights_are_held_to_the_cap(weight: Any) -> None:
    with pytest.raises(RefusedError) as caught:
        policy_for(rounds.client("a")).check(rounds.client("a").adapter(), client="a", weight=weight)
    assert caught.value.code == Reason.WEIGHT and len(caught.value.value) <= 100


def test_what_is_quoted_is_cut_and_printable() -> None:
    quoted = shown("\x1b[31m\n" + "ü" * 10**6)
    assert len(quoted) == 100 and "\x1b" not in quoted and "\n" not in quoted


def test_every_reason_is_documented() -> None:
    source = Path(str(ff.gate.reasons.__file__)).read_text()
    assert all(f'{reason.name} = "{reason.value}"\n    """' in source for reason in Reason)
    assert len(set(Reason)) == len(Reason.__members__)


def test_save_of_a_plain_state_dict_needs_no_config() -> None:
    c = rounds.client("a")
    adapter = policy_for(c).admit(save({k: v.contiguous() for k, v in c.state_dict().items()}), client="a")
    assert_same_adapter(adapter, c.adapter())
