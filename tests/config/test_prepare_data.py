"""What the run file says of the data reaches the data layer: how rows are read, mixed and kept together."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.runs import run_settings
from tests.support.tiny import CHATML, tiny_tokenizer
from tunesmith.config import prepare_data as module
from tunesmith.config.load import load_settings
from tunesmith.config.prepare_data import batch_plan, prepare_data, reading_of
from tunesmith.contracts.errors import DataError
from tunesmith.data.batches import Corpus
from tunesmith.data.formats import AS_USUAL, Reading
from tunesmith.data.mixing import Mix
from tunesmith.data.table import DataReport, TableWriter, TokenTable
from tunesmith.settings.data import SourceSettings

UNUSUAL: dict[str, Any] = {
    "role_key": "who",
    "content_key": "said",
    "train_key": "learn",
    "roles": {"doctor": "assistant"},
    "train_roles": ("assistant", "tool"),
    "last_answer_only": True,
    "reasoning": "keep",
    "tool_calls": "text",
    "template": {"user": "{q}", "assistant": "{a}"},
}


def test_every_field_of_a_reading_is_a_setting_and_arrives():
    assert set(UNUSUAL) == {entry.name for entry in fields(Reading)}
    assert reading_of(SourceSettings(path="a")) == AS_USUAL
    for name, value in UNUSUAL.items():
        reading = reading_of(SourceSettings.model_validate({"path": "a", name: value}))
        assert {n for n in UNUSUAL if getattr(reading, n) != getattr(AS_USUAL, n)} == {name}


def test_every_setting_of_a_row_changes_the_fingerprint_of_the_data(tmp_path: Path):
    def fingerprint(source: dict[str, Any] | None = None, **sections: dict[str, Any]) -> str:
        made = run_settings(tmp_path, tmp_path, rows=6, **sections)
        made["data"]["train"][0] |= source or {}
        return prepare_data(load_settings(made), tiny_tokenizer()).fingerprint

    template = tmp_path / "template.jinja"
    template.write_text(CHATML.replace("'\n'", "'\n\n'"))
    usual = fingerprint()
    assert usual == fingerprint()
    others = [
        *(fingerprint({name: UNUSUAL[name]}) for name in UNUSUAL if name != "template"),
        fingerprint({"split": "[:5]"}),
        fingerprint({"format": "pair"}),
        fingerprint({"columns": {"prompt": "question"}}),
        fingerprint(train={"sequence_length": 127}),
        fingerprint(data={"overlong": "drop"}),
        fingerprint(data={"malformed": "error"}),
        fingerprint(data={"template": str(template)}),
        fingerprint(data={"train_on": "all"}),
        fingerprint(data={"end_of_turn": "all"}),
        fingerprint(data={"prefix_mismatch": "allow"}),
        fingerprint(data={"allow_control_tokens": True}),
    ]
    assert len({usual, *others}) == len(others) + 1


def test_the_mix_reaches_the_plan(tmp_path: Path):
    made = run_settings(tmp_path, tmp_path, data={"mix": {"strategy": "interleave", "stop": "all_exhausted"}})
    assert batch_plan(load_settings(made)).mix == Mix("interleave", "all_exhausted")
    assert batch_plan(load_settings(run_settings(tmp_path, tmp_path, data={"mix": {}}))).mix == Mix()


@pytest.mark.parametrize("packing", [True, False])
def test_a_group_that_no_pack_holds_is_refused_with_its_place(tmp_path: Path, packing: bool):
    with TableWriter(tmp_path) as writer:
        for number, joined in enumerate([False, False, True]):
            ids = np.ones(50, dtype=np.int32)
            writer.add(ids, ids > 0, number, f"rows.jsonl:{number + 1}", joined=joined)
        writer.finish(DataReport(rows_kept=3, tokens=150))
    plan = batch_plan(
        load_settings(run_settings(tmp_path, tmp_path, train={"sequence_length": 64, "packing": packing}))
    )
    corpus = Corpus([TokenTable(tmp_path)])
    if packing:
        with pytest.raises(DataError, match=r"rows\.jsonl:2 have 100 tokens together"):
            module._check_groups(corpus, np.arange(3), plan)
    else:
        module._check_groups(corpus, np.arange(3), plan)
