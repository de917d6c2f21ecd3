"""The attack on uploads finds what there is to find, and its report has figures."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("rouge_score")
pytest.importorskip("dp_accounting")

from benchmarks import inversion
from flexlora_fast.simulate.learners.text import tiny
from flexlora_fast.simulate.questions import Question

TEXTS = [Question("hi you", 0), Question("go there", 1), Question("abc", 2), Question("no", 0)]
SGD = torch.optim.SGD


def client(rank: int) -> inversion.Client:
    tokenizer, model = tiny(3, seed=0)
    # Trained models have one. Without, x(v, p) − x(w, p) + x(w, q) is x(v, q) but for its length: texts that have words
    # and places in common would span pairs that are in none of them.
    bias = model.encoder.embeddings.LayerNorm.bias
    torch.nn.init.normal_(bias, std=0.2, generator=torch.Generator().manual_seed(1))
    return inversion.Client(model, tokenizer, rank)


def view(see: object = inversion.first, clients: int = 1) -> inversion.View:
    return inversion.View("a view", see, clients, ranks=(2, 24))  # type: ignore[arg-type]


def test_inputs_are_those_of_the_model() -> None:
    made = client(2)
    ids = torch.tensor([[5, 9, 5, 200]])
    embeddings = next(m for name, m in made.model.named_modules() if name.endswith("encoder.embeddings"))
    expected, places = embeddings(input_ids=ids)[0], torch.arange(4)
    torch.testing.assert_close(made.inputs.at(ids[0], places), expected)
    W = torch.randn(32, 3, generator=torch.Generator().manual_seed(0))
    found = made.inputs.projected(W)[ids[0], places]
    torch.testing.assert_close(found, expected @ W, rtol=1e-4, atol=1e-5)


def test_a_plain_upload_of_more_columns_than_tokens_gives_all_words_away() -> None:
    got = inversion.read(client(16), view(), 1, TEXTS)
    assert got == inversion.Read(1.0, 1.0, 1.0)
    assert list(inversion.examples(client(16), TEXTS[:1])) == ["- “hi you” → “hi you”"]
    assert inversion.read(client(24), view(), 2, TEXTS).tokens == 1.0


def test_one_of_fewer_columns_does_not() -> None:
    assert inversion.read(client(4), view(), 1, TEXTS).tokens < 0.5


def test_a_secure_sum_puts_the_tokens_of_all_into_one_span() -> None:
    assert inversion.read(client(24), view(inversion.summed, 2), 1, TEXTS).tokens > 0.8
    assert inversion.read(client(8), view(inversion.summed, 2), 1, TEXTS).tokens < 0.5


def test_noise_hides_them() -> None:
    seen = view(lambda c, uploads: inversion.noised(c, uploads, z=0.1))
    assert inversion.read(client(16), seen, 1, TEXTS).tokens < 0.5


def test_wrong_words_are_held_against_it() -> None:
    made = client(4)
    texts = ["hi you"]
    pairs = [(token, place) for place, token in enumerate(made.tokens(texts)[0])]
    assert inversion.judge(made, texts, pairs) == inversion.Read(1.0, 1.0, 1.0)
    h, i, blank, *rest = pairs
    three = inversion.judge(made, texts, [h, i, blank])
    assert (three.tokens, three.rouge1) == (0.5, pytest.approx(2 / 3)), "one word of two, and no wrong one"
    x = (made.tokens(["x"])[0][0], 3)
    assert inversion.judge(made, texts, [h, i, blank, x]).rouge1 == 0.5, "P = 1/2, R = 1/2"
    assert rest


def test_the_table_has_a_row_for_each_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inversion, "BATCHES", (1, 2))
    text = inversion.table(view(), [client(2), client(24)], TEXTS, trials=2)
    *_, low, high = text.splitlines()
    assert low.startswith("| 2 |")
    assert high == "| 24 | 100 / 100 / 100 | 100 / 100 / 100 |"
