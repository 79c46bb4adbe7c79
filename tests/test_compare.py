"""scripts/compare.py: the command writes everything, the page stands alone, a mistake is one sentence."""

import json
import re

import pytest
from conftest import ROOT
from runs_on_disk import LOSSES, write_demo, write_run

from scripts import compare


@pytest.fixture
def runs_dir(tmp_path):
    return write_demo(tmp_path)


def test_command_writes_everything_and_page_stands_alone(runs_dir, capsys):
    compare.main([str(runs_dir)])
    printed = capsys.readouterr().out
    assert "+0.1333" in printed and "report.html" in printed
    folder = runs_dir / "compare"
    assert json.loads((folder / "comparison.json").read_text())["arms"] == list(LOSSES)
    assert "+0.1333" in (folder / "comparison.md").read_text()
    assert (folder / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert (folder / "curves.svg").stat().st_size > 5000
    page = (folder / "report.html").read_text()
    assert page.count("data:image/svg+xml;base64,") == 3 and "+0.1333" in page and "Toy scale" in page
    resources = re.findall(r'(?:src|href)="([^"]*)"|url\(([^)]*)\)|(@import)', page)
    assert all(r[0].startswith(("#", "data:")) for r in resources), resources
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert not list(folder.rglob("*.tmp*"))


def test_command_errors_are_one_sentence(tmp_path, runs_dir):
    (tmp_path / "empty").mkdir()
    mistakes = [["nowhere"], [str(tmp_path / "empty")], [str(runs_dir), "--baseline", "x"], ["--wandb", "x"]]
    ladder = str(ROOT / "config" / "experiments" / "ladder.py")
    mistakes += [
        [str(runs_dir), "--wandb-group=x"],
        [ladder, "--baseline=kronecker"],
        [ladder, "--allow-unfinished"],
    ]
    for argv in (*mistakes, [], ["x", "--wandb", "a/b"], ["--basline", "x"]):
        with pytest.raises(SystemExit) as e:
            compare.main(argv)
        assert str(e.value).startswith("error: ") and "\n" not in str(e.value)


def test_names_of_others_are_shown_as_they_are(tmp_path, capsys):
    """Arms are folders' names had from somebody: no math, no markup, no escapes, and none is lost."""
    for arm in ("bpe_tied", "_private", "$cost$", "a<b>|c"):
        write_run(tmp_path, arm, 1, 4.0, name=f"run{len(arm)}{ord(arm[0])}")
    compare.main([str(tmp_path)])
    page = (tmp_path / "compare" / "comparison.md").read_text()
    assert "a&lt;b>\\|c" in page
    svg = (tmp_path / "compare" / "curves.svg").read_text()
    assert all(name in svg for name in ("_private", "$cost$", "a&lt;b&gt;|c"))
    write_run(tmp_path, "\x1b[31mred", 1, 4.0, name="red")  # no run of ours has such a name
    with pytest.raises(SystemExit, match="has characters that cannot be printed") as refused:
        compare.main([str(tmp_path)])
    assert "\x1b" not in str(refused.value) + capsys.readouterr().out


def test_ctrl_c_and_a_folder_that_is_none_end_in_one_sentence(runs_dir, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    why = "(something else is in the way|a part of this path is a file)"
    with pytest.raises(SystemExit, match=f"^error: .*file.*: {why}"):
        compare.main([str(runs_dir), "--out", str(tmp_path / "file")])
    assert (tmp_path / "file").read_text() == ""

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(compare.numbers, "compare", interrupted)
    with pytest.raises(SystemExit) as leaving:
        compare.main([str(runs_dir)])
    assert leaving.value.code == 130 and "Traceback" not in capsys.readouterr().err


def test_a_page_of_others_is_not_replaced_by_an_experiments_report(tmp_path, monkeypatch):
    """And the report is made from any folder."""
    (tmp_path / "README.md").write_text("# Ours\n")
    monkeypatch.chdir(tmp_path)
    ladder = str(ROOT / "config" / "experiments" / "ladder.py")
    with pytest.raises(SystemExit, match="is something else than the report of ladder"):
        compare.main([ladder, f"--out={tmp_path}"])
    assert [p.name for p in tmp_path.iterdir()] == ["README.md"]
    (tmp_path / "README.md").write_text("# Ladder: input embeddings compared, every arm tuned alike\n")
    compare.main([ladder, f"--out={tmp_path}"])
    assert (tmp_path / "report.json").is_file() and "bpe_untied" in (tmp_path / "README.md").read_text()
