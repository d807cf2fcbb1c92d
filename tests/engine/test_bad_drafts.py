"""Draft models that do not fit their target."""

import json

import pytest
from deployments import HYBRID

from vllm_instant.tools.measure.servers import ServerError


def test_another_vocabulary_is_one_sentence(launch, demo_pair, tmp_path):
    for path in demo_pair.draft.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": 300}))
    with pytest.raises(ServerError) as caught, launch(HYBRID.replace("DRAFT", str(tmp_path))):
        pass
    assert "Target and draft model should have the same vocabulary size" in caught.value.log
    assert "Draft model vocab_size=300" in caught.value.log
    assert "Traceback" not in caught.value.log
