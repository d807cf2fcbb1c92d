"""The process of a classifier: reads texts as JSON lines, and answers with the probability that they are unsafe.

It runs outside of the API server, so that neither its work nor its death delays a request. Whatever has arrived is
classified in one batch.
"""

from __future__ import annotations

import json
import queue
import sys
import threading
from collections.abc import Sequence
from typing import IO, Any

MAX_BATCH = 32


class Classifier:
    """A Hugging Face model for sequence classification.

    Args:
        model: Name or folder.
        device: As torch names it.
        unsafe: Names of the labels that count as unsafe; empty for the last one.
        max_tokens: Maximum number of tokens per text; earlier ones are cut.

    """

    def __init__(self, model: str, device: str, unsafe: Sequence[str], max_tokens: int) -> None:
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        torch.set_num_threads(1)
        self._torch = torch
        self._tokenizer = AutoTokenizer.from_pretrained(model, truncation_side="left")
        self._model = AutoModelForSequenceClassification.from_pretrained(model).eval().to(device)
        self._device = device
        self._max_tokens = max_tokens
        labels = self._model.config.id2label
        self._unsafe = [index for index, label in labels.items() if label in unsafe] or [max(labels)]

    def scores(self, texts: Sequence[str]) -> list[float]:
        """Return the probability that each text is unsafe."""
        batch = self._tokenizer(
            list(texts), padding=True, truncation=True, max_length=self._max_tokens, return_tensors="pt"
        )
        inputs = {key: batch[key].to(self._device) for key in ("input_ids", "attention_mask")}
        with self._torch.inference_mode():
            probabilities = self._model(**inputs).logits.float().softmax(-1)
        return [float(row) for row in probabilities[:, self._unsafe].sum(-1)]


def serve(classify: Any, lines: IO[str], answers: IO[str]) -> None:
    """Answer all lines, batch by batch, until they end."""
    waiting: queue.Queue[dict[str, Any] | None] = queue.Queue()

    def read() -> None:
        for line in lines:
            waiting.put(json.loads(line))
        waiting.put(None)

    threading.Thread(target=read, daemon=True).start()
    while True:
        batch = [waiting.get()]
        while len(batch) < MAX_BATCH and not waiting.empty():
            batch.append(waiting.get_nowait())
        found = [item for item in batch if item is not None]
        if found:
            for item, score in zip(found, classify([item["text"] for item in found]), strict=True):
                answers.write(json.dumps({"id": item["id"], "score": score}) + "\n")
            answers.flush()
        if len(found) < len(batch):
            return


def main() -> None:
    """Load the model that the first line names, say that it is ready, and serve."""
    answers = sys.stdout
    sys.stdout = sys.stderr  # whatever a library prints must not be taken for an answer
    classifier = Classifier(**json.loads(sys.stdin.readline()))
    classifier.scores(["ready"])
    answers.write(json.dumps({"ready": True}) + "\n")
    answers.flush()
    serve(classifier.scores, sys.stdin, answers)


if __name__ == "__main__":
    main()
