"""What fuzzers call: targets from bytes to the gate, and an oracle for whatever it answers.

A target takes any bytes. The gate must refuse with a known reason, or admit an adapter that keeps to the policy by
sums done again here from what the safetensors library reads. Anything else raises.
``python -m benchmarks.fuzz`` drives them by coverage, ``test_gate_fuzz.py`` by chance.
"""

from __future__ import annotations

import json
import math
import random
import struct
from collections.abc import Callable
from typing import Any

import torch
from safetensors.torch import load, save

from flexlora_fast import Adapter, tensorfile
from flexlora_fast import config as configs
from flexlora_fast.errors import RefusedError
from flexlora_fast.gate import Reason, RoundPolicy
from flexlora_fast.layouts import LayerSpec
from tests import hostile, rounds

RANKS = (2, 4)
ALPHA = 8.0  # of every layer of both references, at any rank
LAYER, ALL, EXTRA = 1e3, 2e3, 1e3  # bounds of norms
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LONGEST = 16_384  # bytes of an input; hostile files that are longer are refused for that alone

Upload = tuple[bytes, bytes | None]


def _everything(rank: int, dtype: torch.dtype) -> rounds.Client:
    """Every kind of layer, a bias of B, heads of other dtypes."""
    c = rounds.client("ref", "mixed", rank=rank, alpha=ALPHA, dtype=dtype, lora_bias=True)
    extras = {"head.weight": torch.ones(3, 2), "count": torch.ones(2, dtype=torch.int64), "one": torch.tensor(1.5)}
    return c.but(bias={"h.0.up": torch.ones(29, dtype=dtype)}, extras=extras)


def _plain(rank: int, dtype: torch.dtype) -> rounds.Client:
    c = rounds.client("ref", rank=rank, alpha=ALPHA, dtype=dtype)
    return c.but(extras={"head.weight": torch.ones(3, 2)})


def _policy(c: rounds.Client, **rules: Any) -> RoundPolicy:
    bounds = {"max_layer_norm": LAYER, "max_norm": ALL, "max_extra_norm": EXTRA}
    return RoundPolicy.from_adapter(c.adapter(), ranks=RANKS, **bounds, **rules)


def _file(c: rounds.Client) -> bytes:
    return save({key: tensor.contiguous() for key, tensor in c.state_dict().items()})


PLAIN = _policy(_plain(4, torch.float32))
RICH = _policy(_everything(4, torch.float32), partial=True)
GOOD: dict[RoundPolicy, list[bytes]] = {
    policy: [_file(make(rank, dtype)) for rank in RANKS for dtype in DTYPES]
    for policy, make in ((PLAIN, _plain), (RICH, _everything))
}
ABOUT: dict[RoundPolicy, list[bytes]] = {
    policy: [json.dumps(make(rank, torch.float32).config | {"peft_type": "LORA"}).encode() for rank in RANKS]
    for policy, make in ((PLAIN, _plain), (RICH, _everything))
}


# -- the oracle ---


def judge(policy: RoundPolicy, weights: bytes, config: bytes | None) -> str:
    """``"admitted"`` or the code of the refusal; raises for any other outcome."""
    try:
        adapter = policy.admit(weights, client="c", config=config)
    except RefusedError as error:
        assert error.code in _REASONS and error.client == "c" and error.remedy
        assert len(str(error)) < 1500 and str(error).isprintable() and len(error.value) <= 100
        return error.code
    check(policy, adapter, weights)
    return "admitted"


_REASONS = frozenset(Reason)


def check(policy: RoundPolicy, adapter: Adapter, weights: bytes) -> None:
    """Raise where an admitted adapter is not what the library reads, or not within the policy."""
    state = load(weights)
    kept = adapter.state_dict()
    assert kept.keys() == state.keys(), "names differ from the library's"
    for key, tensor in state.items():
        assert kept[key].dtype == tensor.dtype and kept[key].shape == tensor.shape, key
        assert torch.equal(_bits(kept[key]), _bits(tensor)), f"{key} has other bits than the library reads"
        assert bool(torch.isfinite(tensor.double()).all()), f"{key} is not finite"
    of = policy.reference
    expected = set(of.extras)
    squares = 0.0
    for layer, spec in adapter.skeleton.specs.items():
        assert spec == of.specs[layer]
        rank = state[spec.a_key].shape[0] // spec.experts
        assert rank in RANKS and adapter.rank(layer) == rank
        _check_shapes(spec, state, rank)
        assert adapter.scale(layer) == ALPHA / rank
        assert configs.rank_for(adapter.config, spec.pattern_name) == rank
        assert math.isclose(configs.scale_for(adapter.config, spec.pattern_name), ALPHA / rank, rel_tol=1e-12)
        norm = ALPHA / rank * _norm(spec, state, rank)
        assert norm <= LAYER * (1 + 1e-9), f"{layer} has norm {norm}"
        squares += norm**2
        expected |= {spec.a_key, spec.b_key}
        if layer in of.bias_keys:
            bias = state[of.bias_keys[layer]]
            assert bias.shape == (spec.m,) and ALPHA / rank * _length(bias) <= LAYER * (1 + 1e-9)
            expected.add(of.bias_keys[layer])
    assert math.sqrt(squares) <= ALL * (1 + 1e-9)
    assert adapter.layers and (policy.partial or adapter.layers == sorted(of.specs))
    assert state.keys() == expected, "tensors beyond those of its layers"
    for key, tensor in state.items():
        same = key in of.extras and tensor.dtype == of.extras[key].dtype
        assert same or tensor.dtype in DTYPES, f"{key} is {tensor.dtype}"
    for key, form in of.extras.items():
        assert state[key].shape == form.shape
        assert not state[key].is_floating_point() or _length(state[key]) <= EXTRA * (1 + 1e-9)
    assert adapter.config.keys() <= {*of.config, "target_parameters"} and json.dumps(adapter.config, allow_nan=False)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _length(tensor: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))


def _check_shapes(spec: LayerSpec, state: dict[str, torch.Tensor], rank: int) -> None:
    rows, columns = (rank * spec.experts, spec.n), (spec.m, rank * spec.experts)
    if spec.kind == "conv":
        rows, columns = (rank, *spec.a_shape_tail), (spec.m, rank, *[1] * (len(spec.a_shape_tail) - 1))
    assert state[spec.a_key].shape == rows and state[spec.b_key].shape == columns


def _norm(spec: LayerSpec, state: dict[str, torch.Tensor], rank: int) -> float:
    """‖B·A‖_F, dense, in float64: A is expert-major, B rank-major."""
    A = state[spec.a_key].double().reshape(spec.experts, rank, spec.n)
    B = state[spec.b_key].double().reshape(spec.m, rank, spec.experts)
    return float(torch.einsum("mre,ern->emn", B, A).norm())


# -- targets ---


def file(data: bytes) -> str:
    """The bytes are the weights."""
    return judge(PLAIN, data, None)


def config(data: bytes) -> str:
    """The bytes are the config beside good weights of rank 4."""
    return judge(PLAIN, GOOD[PLAIN][3], data)


def bent(data: bytes) -> str:
    """The bytes say how a good file is bent."""
    return judge(*bend(data))


class Choices:
    """Numbers read from bytes; zeros once they are used up."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def below(self, count: int) -> int:
        """One of 0 … count - 1."""
        width = 1 if count <= 256 else 2 if count <= 65_536 else 4
        return int.from_bytes(self.take(width), "little") % count

    def take(self, count: int) -> bytes:
        self._at += count
        return self._data[self._at - count : self._at].ljust(count, b"\0")

    def of(self, options: Any) -> Any:
        return options[self.below(len(options))]

    @property
    def left(self) -> bool:
        return self._at < len(self._data)


SIDES = [
    0,
    1,
    2,
    3,
    4,
    7,
    8,
    11,
    12,
    16,
    23,
    29,
    48,
    -1,
    2**31,
    2**32,
    2**61,
    2**62,
    2**63,
    2**64,
    1.5,
    True,
    None,
    "4",
]
TYPES = ["F32", "F16", "BF16", "F64", "I64", "I32", "U8", "BOOL", "F8_E4M3", "C64", "F4", "f32", "", 3, None]
FLOATS = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-45, 1e-30, 1.0, -3e2, 1e5, 1e12, 1e19, 1e30, -3.4e38]
VALUES: list[Any] = [
    *(None, True, False, 0, 1, 2, 4, 8, -8, 4.0, 8.5, 1e-320, 1e308, 10**12, "", "4", "LORA", "(a+)+$", "up", [], {}),
    *({"up": 2}, {"up": 4}, {"h.0.up": 8}, {"^h\\.0\\.up": 4}, {".*": 4}, ["up"], [[1]], [3, 5], "false", "pissa"),
]
KEYS = [
    *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "peft_type", "use_dora", "init_lora_weights"),
    *(
        "target_modules",
        "base_model_name_or_path",
        "trainable_token_indices",
        "loftq_config",
        "layer_replication",
        "bias",
    ),
    *("fan_in_fan_out", "modules_to_save", "lora_bias", "alora_invocation_tokens", "megatron_config", "x"),
]


def bend(data: bytes) -> tuple[RoundPolicy, bytes, bytes | None]:
    """A policy, and a good upload for it after up to 4 changes."""
    choose = Choices(data)
    policy = choose.of((PLAIN, RICH))
    weights, about = choose.of(GOOD[policy]), choose.of([None, *ABOUT[policy]])
    end = 8 + int.from_bytes(weights[:8], "little")
    header, body = json.loads(weights[8:end]), bytearray(weights[end:])
    text: Callable[[bytes], bytes] = bytes
    for _ in range(choose.below(5)):
        if not choose.left:
            break
        what = choose.of((0, 0, 0, 1, 1, 2, 3, 3, 3, 4, 5, 6, 7, 7))
        if what == 0:
            _put_values(choose, header, body)
        elif what == 1:
            _bend_entry(choose, header)
        elif what == 2:
            _bend_names(choose, header)
        elif what == 3 and about is not None:
            document = json.loads(about)
            document[choose.of(KEYS)] = choose.of(VALUES)
            about = json.dumps(document).encode()
        elif what == 4:
            at = choose.below(len(body) + 1)
            body[at : at + choose.below(8)] = choose.take(choose.below(8))
        elif what == 5:
            text = _spaced if choose.below(8) else _twice
        elif what == 6:
            header["__metadata__"] = choose.of(
                [{"format": "pt"}, {"a": "b" * 999}, {}, None, {"a": 1}, [], "", {"a": "b" * 5000}]
            )
        else:
            _leave_out(choose, policy, header)
    if choose.below(8):  # most often header and data agree, so that what lies behind the header's check is reached
        header, body = _repaired(header, body)
    encoded = text(json.dumps(header).encode())
    wrong = [len(encoded) + 1, len(encoded) - 1, 2**63, 0]
    length = choose.of([*[len(encoded)] * 60, *wrong])
    return policy, length.to_bytes(8, "little") + encoded + bytes(body), about


def _repaired(header: dict[str, Any], body: bytearray) -> tuple[dict[str, Any], bytearray]:
    """The same tensors, each with as many bytes as its shape takes, side by side."""
    new, data = dict[str, Any](), bytearray()
    for name, entry in header.items():
        new[name] = entry
        if not isinstance(entry, dict) or not _plain_offsets(entry) or str(entry.get("dtype")) not in tensorfile.DTYPES:
            continue
        shape = entry.get("shape")
        if not isinstance(shape, list) or not all(type(side) is int and 0 <= side < 100 for side in shape):
            continue
        size = math.prod(shape) * tensorfile.DTYPES[entry["dtype"]].itemsize
        if size > LONGEST:
            continue
        start = entry["data_offsets"][0]
        new[name] = entry | {"data_offsets": [len(data), len(data) + size]}
        data += body[start : start + size].ljust(size, b"\0")
    return new, data


def _put_values(choose: Choices, header: dict[str, Any], body: bytearray) -> None:
    """A special number into one tensor: at one place, or everywhere."""
    entry = header.get(choose.of(sorted(header)))
    if not isinstance(entry, dict) or not isinstance(entry.get("data_offsets"), list):
        return
    offsets = [x for x in entry["data_offsets"] if isinstance(x, int) and 0 <= x <= len(body)]
    if len(offsets) != 2 or offsets[0] >= offsets[1]:
        return
    value = choose.of(FLOATS)
    packed = {
        "F32": lambda: struct.pack("<f", value),
        "F16": lambda: struct.pack("<e", value if abs(value) < 65_000 or not math.isfinite(value) else 65_504.0),
        "BF16": lambda: struct.pack("<f", value)[2:],
    }.get(str(entry.get("dtype")), lambda: choose.take(8))()
    start, stop = offsets
    count = max(1, (stop - start) // len(packed))
    if choose.below(2):
        body[start : start + count * len(packed)] = packed * count
    else:
        at = start + choose.below(count) * len(packed)
        body[at : at + len(packed)] = packed


def _bend_entry(choose: Choices, header: dict[str, Any]) -> None:
    entry = header.get(choose.of(sorted(header)))
    if not isinstance(entry, dict):
        return
    field = choose.of(("shape", "dtype", "data_offsets", "more", "less"))
    if field == "dtype":
        entry["dtype"] = choose.of(TYPES)
    elif field == "more":
        entry[choose.of(("x", "dtype ", "strides"))] = choose.of(VALUES)
    elif field == "less":
        entry.pop(choose.of(("shape", "dtype", "data_offsets")), None)
    elif isinstance(entry.get(field), list) and entry[field] and choose.below(4):
        at = choose.below(len(entry[field]))
        new = choose.of(SIDES)
        entry[field][at] = new if choose.below(2) or not isinstance(entry[field][at], int) else entry[field][at] + 4
    else:
        entry[field] = [choose.of(SIDES) for _ in range(choose.below(20))]


def _bend_names(choose: Choices, header: dict[str, Any]) -> None:
    names = sorted(header)
    name = choose.of(names)
    what = choose.below(5)
    if what == 0:
        del header[name]
    elif what == 1:  # the entries of two change places
        other = choose.of(names)
        header[name], header[other] = header[other], header[name]
    elif what == 2:
        header[
            choose.of(["", "\0", "../x", "\u202e", "\ud800", name + " ", name.removeprefix("base_model.model.")])
        ] = header.pop(name)
    elif what == 3:
        header["x" * choose.below(64)] = header[name]
    else:
        header[name.replace("lora_A", "lora_B")] = header.pop(name)
    if not header:
        header[name] = {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}


def _leave_out(choose: Choices, policy: RoundPolicy, header: dict[str, Any]) -> None:
    """One layer's tensors go from the header."""
    spec = policy.specs[choose.of(sorted(policy.specs))]
    for key in (spec.a_key, spec.b_key, policy.reference.bias_keys.get(spec.name, "")):
        if len(header) > 1:
            header.pop(key, None)


def _plain_offsets(entry: dict[str, Any]) -> bool:
    offsets = entry.get("data_offsets")
    return isinstance(offsets, list) and len(offsets) == 2 and all(type(x) is int for x in offsets)


def _twice(header: bytes) -> bytes:
    """Every key of the header twice."""
    return header[:-1] + b", " + header[1:]


def _spaced(header: bytes) -> bytes:
    return header.replace(b",", b" ,\n") + b"  "


TARGETS: dict[str, Callable[[bytes], str]] = {"file": file, "config": config, "bent": bent}


def seeds(target: str) -> list[bytes]:
    """What a fuzzer begins with: good uploads, and every hostile one that is not too long."""
    generator = random.Random(0)
    if target == "file":
        found = [*GOOD[PLAIN], *(make() for make, _ in hostile.WEIGHTS.values())]
    elif target == "config":
        found = [*ABOUT[PLAIN], b"{}", *(content for content, _ in hostile.CONFIGS.values())]
    else:
        found = [bytes([policy, good, 0]) for policy in range(2) for good in range(6)]
        found += [generator.randbytes(generator.randrange(3, 60)) for _ in range(200)]
    return [data for data in found if len(data) <= LONGEST]


def words(target: str) -> list[bytes]:
    """What a fuzzer may put in: the tokens of headers and configs."""
    keys = [*hostile.header(), "__metadata__", "dtype", "shape", "data_offsets", *map(str, TYPES)]
    texts = {"file": keys, "config": [*KEYS, "h.0.up", "up"], "bent": []}[target]
    marks = [b"NaN", b"Infinity", b"1e999", b"-1", b"[]", b"{}", b"null", b"true", b"\\ud800", b"9" * 31, b"[" * 13]
    return [json.dumps(text).encode() for text in texts] + ([] if target == "bent" else marks)


def mutated(generator: random.Random, pool: list[bytes], tokens: list[bytes]) -> bytes:
    """One of the pool after a few changes by chance, as coverage-guided fuzzers make them."""
    data = bytearray(generator.choice(pool))
    for _ in range(generator.randrange(1, 5)):
        at, kind = generator.randrange(len(data) + 1), generator.randrange(6)
        to = min(len(data), at + generator.choice((1, 1, 2, 4, 16, 256)))
        if kind == 0 and at < len(data):
            data[at] ^= 1 << generator.randrange(8)
        elif kind == 1:
            data[at:to] = generator.randbytes(to - at)
        elif kind == 2:
            del data[at:to]
        elif kind == 3:
            data[at:at] = data[at:to]
        elif kind == 4 and tokens:
            data[at : generator.choice((at, to))] = generator.choice(tokens)
        elif kind == 5:
            other = generator.choice(pool)
            data[at:] = other[generator.randrange(len(other) + 1) :]
    return bytes(data[:LONGEST])
