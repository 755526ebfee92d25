"""recipes.ablation on drawn faces: rows that share a training, what is written, interruption, refusals."""

import json
from dataclasses import replace

import pytest
import torch

from fastforest import data
from fastforest.cli import main
from fastforest.recipes import ablation
from fastforest.recipes.ablation import HEADS, QUESTIONS, Recipe, Row

SMALL = Recipe(
    size=32,
    training={"rounds": 2, "steps": 1, "batch": 4},
    augment={},
    backbone={"backbone_options": {"width": 4, "code": 8}},
)
TABLE = {
    "Which decoding?": (Row("soft", "dense", decode="soft_argmax"), Row("quarter", "dense", decode="quarter")),
    "Which sigma?": (Row("one", "forest", {"leaves": 16, "canvas": 8, "sigma": 1.0}),),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def few_faces(monkeypatch):
    monkeypatch.setattr(ablation.data, "open_dataset", lambda name, size, **_: data.SyntheticFaces(20, size))


def test_tables_spread_and_pictures(tmp_path):
    out = tmp_path / "out"
    summary = ablation.run(TABLE, "synthetic", out, 10.0, seeds=2, recipe=SMALL)
    assert json.loads((out / "results.json").read_text()) == summary
    assert (summary["train"], summary["held_out"], summary["minutes"]) == (18, 2, 2.5)
    soft, quarter = summary["questions"]["Which decoding?"]
    assert soft["nme"] != quarter["nme"] and soft["steps"] == quarter["steps"] == [2, 2]
    assert soft["nme"][0] != soft["nme"][1], "two seeds, two results"
    assert sorted(path.name for path in (out / "runs").iterdir()) == [
        "dense-0",
        "dense-1",
        "forest_leaves=16_canvas=8_sigma=1.0-0",
        "forest_leaves=16_canvas=8_sigma=1.0-1",
    ]
    text = (out / "results.md").read_text()
    assert "**Which sigma?**" in text and "| quarter | " in text and " +- " in text and "| the mean shape | " in text
    assert (out / "table.png").stat().st_size > 0 and not (out / "ced.png").exists()


def test_one_table_has_curves_and_its_checkpoints_can_be_evaluated(tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    rows = TABLE["Which decoding?"]
    summary = ablation.run({"heads": rows}, "synthetic", out, 10.0, recipe=SMALL)
    assert (out / "ced.png").exists() and (out / "curves.png").exists()
    capsys.readouterr()
    assert (
        main(
            [
                "evaluate",
                "--checkpoint",
                str(out / "runs" / "dense-0" / "checkpoint.pt"),
                "--data",
                "synthetic",
                "--faces",
                "20",
            ]
        )
        == 0
    )
    assert f"{100 * summary['questions']['heads'][0]['nme'][0]:.2f} %" in capsys.readouterr().out

    calls = []
    monkeypatch.setattr(ablation.training, "fit", lambda *a, **k: calls.append(a))
    again = ablation.run({"heads": rows}, "synthetic", out, 10.0, recipe=SMALL)
    assert not calls and again == summary, "what is trained is read, not trained again"
    with pytest.raises(ablation.BadInput, match=r"was begun with minutes = 10\.0, got 20\.0"):
        ablation.run({"heads": rows}, "synthetic", out, 20.0, recipe=SMALL)


def test_an_interrupted_run_has_every_seed_before_and_goes_on_at_its_last_round(tmp_path, monkeypatch):
    table, told, fit = {"heads": TABLE["Which sigma?"]}, [], ablation.training.fit

    def listen(record):
        told.append(record["round"])
        if len(told) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(
        ablation.training, "fit", lambda *given, **options: fit(*given, **options | {"on_round": listen})
    )
    with pytest.raises(KeyboardInterrupt):
        ablation.run(table, "synthetic", tmp_path, 10.0, seeds=2, recipe=SMALL)
    before = json.loads((tmp_path / "results.json").read_text())
    assert before["seeds"] == 1 and before["questions"]["heads"][0]["steps"] == [2]
    found = ablation.run(table, "synthetic", tmp_path, 10.0, seeds=2, recipe=SMALL)["questions"]["heads"][0]
    assert told == [1, 2, 1, 2] and found["steps"] == [2, 2]
    assert found["nme"][0] == before["questions"]["heads"][0]["nme"][0]


def test_a_run_of_another_recipe_is_not_continued(tmp_path):
    ablation.run({"heads": TABLE["Which sigma?"]}, "synthetic", tmp_path, 10.0, recipe=SMALL)
    other = replace(SMALL, augment={"rotation": 5.0})
    with pytest.raises(ablation.BadInput, match=r"was begun with augment = \{\}, got \{'rotation': 5\.0\}"):
        ablation.run({"heads": TABLE["Which sigma?"]}, "synthetic", tmp_path, 10.0, recipe=other)
    (tmp_path / "settings.json").write_text('{"data": "synthetic"}')  # as it was before recipes were noted
    ablation.run({"heads": TABLE["Which sigma?"]}, "synthetic", tmp_path, 10.0, recipe=other)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_the_command_says_so(tmp_path, capsys):
    assert ablation.main(["heads", "--data", "synthetic", "--out", str(tmp_path / "out"), "--device", "cuda"]) == 2
    assert capsys.readouterr().err == "fastforest: --device cuda: this PyTorch finds no CUDA device\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("table", [HEADS, QUESTIONS], ids=["heads", "questions"])
def test_rows_have_one_label_and_one_folder_each(table):
    for question, rows in table.items():
        assert len({row.label for row in rows}) == len(rows), question
    folders = {row.key(): (row.model, dict(row.options), dict(row.training)) for rows in table.values() for row in rows}
    for rows in table.values():
        for row in rows:
            assert folders[row.key()] == (row.model, dict(row.options), dict(row.training))


def test_rows_are_chosen_by_words():
    assert list(ablation._chosen(QUESTIONS, "loss")) == ["Which loss, with which leaf update?"]
    assert [row.label for row in ablation._chosen(HEADS, "leafpool")["heads"]] == [
        "LeafPool",
        "LeafPool, residual to the mean face",
    ]
    with pytest.raises(ablation.BadInput, match="no question or row holds these words"):
        ablation._chosen(HEADS, "unheard of")
