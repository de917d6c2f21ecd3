"""Small files in the formats in which the data of tasks with generated answers is published."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

from flexlora_fast.simulate.tasks import commonsense as sets


def authors(folder: Path, clients: int) -> Path:
    """FederatedScope's data/1613: three files a client."""
    for i in range(clients):
        for part, count in (("training", 8), ("eval", 2), ("test", 3)):
            rows = [
                {
                    "instruction": f"Do task {i}.",
                    "input": f"{part} {j} of {i}",
                    "output": f"answer {j} of {i}",
                    "category": f"Program Execution {100 + i}.json",
                }
                for j in range(count)
            ]
            (folder / f"local_{part}_{i}.json").write_text(json.dumps(rows))
    return folder


def original(folder: Path, tasks: int, instances: int) -> Path:
    """allenai/natural-instructions: a file a task, and the names of those kept for testing."""
    (folder / "tasks").mkdir()
    (folder / "splits" / "default").mkdir(parents=True)
    (folder / "splits" / "default" / "test_tasks.txt").write_text(f"task{tasks - 1:03}_x\n")
    for i in range(tasks):
        task = {
            "Contributors": ["somebody"],
            "Categories": ["Sorting"],
            "Definition": [f"Do task {i}."],
            "Positive Examples": [],
            "Instances": [
                {"id": f"task{i}-{j}", "input": f"input {j}", "output": [f"answer {j}", "another"]}
                for j in range(instances)
            ],
        }
        (folder / "tasks" / f"task{i:03}_x.json").write_text(json.dumps(task))
    return folder


def client_lines(folder: Path, clients: int) -> Path:
    """A client a line; those of even number sort, the last one answers in Hindi."""
    path = folder / "clients.jsonl.gz"
    lines = []
    for i in range(clients):
        word = "नमस्ते दुनिया " * 20 if i == clients - 1 else "answer"
        examples = [{"input": f"input {j}", "output": f"{word} {j}"} for j in range(4)]
        line = {"client": f"c{i}", "category": "Chatting" if i % 2 else "Sorting", "instruction": f"Do task {i}."}
        lines.append(json.dumps(line | {part: examples for part in ("train", "eval", "test")}))
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    return path


def gsm8k(folder: Path) -> Path:
    """OpenAI's lines."""
    for part, count in (("train", 8), ("test", 3)):
        rows = [
            {"question": f"How much is {i} + 1?", "answer": f"{i} + 1 = <<{i}+1={i + 1}>>{i + 1}\n#### {i + 1}"}
            for i in range(count)
        ]
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def commonsense(folder: Path) -> Path:
    """LLM-Adapters' folder dataset/, all eight sets."""
    for name, choices in sets.CHOICES.items():
        (folder / name).mkdir()
        for part, count in (("train", 4), ("test", 2)):
            rows = [
                {
                    "instruction": f"Question {i}, answer {' or '.join(choices)}.",
                    "input": "",
                    "output": f"the correct answer is {choices[i % 2]}",
                    "answer": choices[i % 2],
                }
                for i in range(count)
            ]
            (folder / name / f"{part}.json").write_text(json.dumps(rows))
    return folder


def telequad(folder: Path) -> Path:
    """TeleQuAD v4: two documents of ten questions with an answer and one without."""
    path = folder / "TeleQuAD-v4-full.json"

    def question(i: int, answers: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": str(i), "type": "short", "question": f"What is {i}?", "answers": answers, "is_impossible": False}

    def paragraph(document: str, i: int) -> dict[str, Any]:
        answer = {"text": f"Paragraph {i}", "answer_start": 0, "answer_end": 11, "contributor": "c"}
        return {"qas": [question(i, [answer])], "context": f"Paragraph {i} of {document}"}

    documents = [
        {
            "docid": name,
            "title": name,
            "source": "3GPP",
            "paragraphs": [
                *(paragraph(name, i) for i in range(10)),
                {"qas": [question(10, [])], "context": "Nothing."},
            ],
        }
        for name in ("36.331", "38.211")
    ]
    path.write_text(json.dumps({"version": "4", "description": "", "date": "", "data": documents}))
    return path
