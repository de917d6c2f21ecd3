"""Whatever bytes come: a refusal with a code, or an adapter equal to what ``Adapter.load`` reads; nothing else."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import save

import flexlora_fast as ff
from flexlora_fast import config as configs
from flexlora_fast.errors import RefusedError
from flexlora_fast.folder import CONFIG_NAME, WEIGHTS_NAME
from flexlora_fast.gate import Reason, RoundPolicy, claims
from tests import hostile

POLICY = RoundPolicy.from_adapter(hostile.reference().adapter(), ranks=(2, 4))
VALID = save(hostile.tensors())
ABOUT = hostile.config()
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**6), 10**6) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


def outcome(weights: bytes, about: bytes | None) -> ff.Adapter | str:
    """The adapter, or the code of its refusal; anything else raised fails the test."""
    try:
        return POLICY.admit(weights, client="c", config=about)
    except RefusedError as error:
        assert error.code in set(Reason) and error.client == "c" and str(error).isprintable()
        return error.code


def assert_as_loaded(adapter: ff.Adapter, weights: bytes, about: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / WEIGHTS_NAME).write_bytes(weights)
        (Path(folder) / CONFIG_NAME).write_bytes(about)
        loaded = ff.Adapter.load(folder).in_memory()
    a, b = adapter.skeleton, loaded.skeleton
    assert (a.specs, a.ranks, a.scales, a.extra_keys, a.forms) == (b.specs, b.ranks, b.scales, b.extra_keys, b.forms)
    for key, tensor in loaded.state_dict().items():
        assert torch.equal(adapter.state_dict()[key], tensor)


@given(st.binary(max_size=200))
def test_any_bytes(content: bytes) -> None:
    assert outcome(content, None) in ("header", "header-size", "pickle", "missing-tensor", "unknown-tensor")
    assert isinstance(outcome(VALID, content), str)  # not even {} is admitted: PEFT's default rank is 8


@given(st.data())
def test_a_damaged_file_is_refused_or_read_as_load_reads_it(data: st.DataObject) -> None:
    """Bytes of header or data changed, cut away, put in or doubled."""
    content = bytearray(VALID)
    for _ in range(data.draw(st.integers(0, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] = data.draw(st.integers(0, 255))
    kind, at, to = data.draw(st.tuples(st.sampled_from("kkkcid"), *[st.integers(0, len(content))] * 2))
    at, to = min(at, to), max(at, to)
    if kind == "c":
        del content[at:to]
    elif kind in "id":
        content[at:at] = content[at:to] if kind == "d" else data.draw(st.binary(max_size=20))
    got = outcome(bytes(content), ABOUT)
    if isinstance(got, ff.Adapter):
        assert_as_loaded(got, bytes(content), ABOUT)


@given(st.data())
def test_a_bent_header_is_refused_or_read_as_load_reads_it(data: st.DataObject) -> None:
    document = hostile.header()
    name = data.draw(st.sampled_from(sorted(document)))
    field = data.draw(st.sampled_from(["dtype", "shape", "data_offsets", "more"]))
    number = st.sampled_from([-1, 0, 1, 2, 4, 12, 29, 96, 192, 464, 2**31, 2**62, 2**63, 2**64, 1.5, True])
    values: dict[str, Any] = {
        "dtype": st.sampled_from(["F32", "F16", "BF16", "F64", "I32", "U8", "F8_E4M3", "", "f32"]),
        "shape": st.lists(number, max_size=4),
        "data_offsets": st.lists(number, max_size=3),
        "more": JSON,
    }
    document[name][field] = data.draw(values[field] | JSON)
    if data.draw(st.booleans()):
        document[data.draw(st.text(max_size=10))] = document.pop(name)
    content = hostile.raw(document)
    got = outcome(content, ABOUT)
    if isinstance(got, ff.Adapter):
        assert_as_loaded(got, content, ABOUT)


@given(st.data())
def test_a_bent_config_is_refused_or_read_as_load_reads_it(data: st.DataObject) -> None:
    document = json.loads(ABOUT)
    keys = [*sorted(document), "use_dora", "eva_config", "alora_invocation_tokens", "modules_to_save"]
    for _ in range(data.draw(st.integers(1, 2))):
        document[data.draw(st.sampled_from(keys))] = data.draw(JSON | st.sampled_from([2, 4, 8, True, "LORA"]))
    about = json.dumps(document).encode()
    got = outcome(VALID, about)
    if isinstance(got, ff.Adapter):
        # What the gate does not read of a config, since the server's stands in for it, may still be wrong to ``load``.
        sane = json.dumps({key: document[key] for key in POLICY.config if key in document} | targets()).encode()
        assert_as_loaded(got, VALID, sane)


def targets() -> dict[str, Any]:
    keep = ("target_modules", "target_parameters", "fan_in_fan_out")
    return {key: value for key, value in json.loads(ABOUT).items() if key in keep}


LAYERS = ["h.0.up", "h.1.up", "h.10.up", "h.0.down", "h-1.up", "a b.up", "up"]
PARTS = st.sampled_from(
    ["h", "0", "1", "10", "up", "down", ".", "^", r"\.", r"\-", "-", "a b", r"a\ b", "(", "+", "$", "|"]
)


@example(["h.0.up", "0.up", "up"])
@example([r"^h\.0\.up", "^up"])
@given(st.lists(st.lists(PARTS, min_size=1, max_size=5).map("".join), unique=True, max_size=4))
def test_patterns_are_refused_or_mean_what_peft_means(patterns: list[str]) -> None:
    """A dot of a pattern stands for itself alone here, for any character in PEFT: names where that matters differ."""
    config = {"r": 1, "rank_pattern": {pattern: i + 2 for i, pattern in enumerate(patterns)}}
    try:
        found = claims._resolve(config, "rank_pattern", LAYERS)
    except RefusedError as error:
        assert error.code == Reason.PATTERN and any(re.search(r"[(+$|]|\^\^|.\^|\^$", p) for p in patterns)
        return
    for layer in LAYERS:
        dotted = {
            p.replace(".", r"\.") if "\\" not in p else re.sub(r"(?<!\\)\.", r"\.", p): v
            for p, v in config["rank_pattern"].items()
        }
        expected = next((v for p, v in dotted.items() if re.match(rf"(.*\.)?({p})$", layer)), None)
        assert found.get(layer) == expected


@pytest.mark.parametrize("names", [["q"], ["a.b", "c"]])
def test_what_with_ranks_writes_is_always_literal(names: list[str]) -> None:
    odd = [*names, "layers.0.self-attn", "weird name.x", "ünï.0", "a+b.c", "x(1).y", "m[0]"]
    written = configs.with_ranks({"r": 1}, {n: i + 1 for i, n in enumerate(odd)}, dict.fromkeys(odd, 2.0))
    for option in ("rank_pattern", "alpha_pattern"):
        found = claims._resolve(written, option, odd)
        assert all(
            found.get(name, written[{"rank_pattern": "r", "alpha_pattern": "lora_alpha"}[option]])
            == {"rank_pattern": configs.rank_for, "alpha_pattern": configs.alpha_for}[option](written, name)
            for name in odd
        )
