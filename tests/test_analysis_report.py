"""scripts/analysis/report.py: tables in three forms, and a page on which nothing from a record comes alive."""

import base64
import json
import re

import pytest

from data import DataError
from scripts.analysis import report
from scripts.analysis.report import Table


def test_a_table_in_its_forms():
    table = Table("Losses", ["arm", "loss"], [["bpe", "4.0"], ["kronecker", "13.95"]], note="nats")
    text = "Losses\n\narm         loss\n----------------\nbpe          4.0\nkronecker  13.95\nnats"
    page = "## Losses\n\n| arm | loss |\n| --- | ---: |\n| bpe | 4.0 |\n| kronecker | 13.95 |\n\nnats"
    assert (table.text(), table.markdown()) == (text, page)


def test_sections_are_gathered_in_order_and_replaced(tmp_path):
    report.write_section(tmp_path, "late", "Later", 20, [{"text": ["second & last"]}])
    page = report.write_section(tmp_path, "early", "Earlier", 10, [{"text": ["first"]}]).read_text()
    assert page.index("Earlier") < page.index("Later") and "second &amp; last" in page
    page = report.write_section(tmp_path, "late", "Later", 20, [{"text": ["replaced"]}]).read_text()
    assert "second" not in page and "replaced" in page


EVIL = '<script>alert(1)</script><img src="http://outside/x.png">'


def test_nothing_in_a_section_comes_alive(tmp_path):
    """Every text of a section had from somebody is shown as text; the page itself forbids scripts and outside resources."""
    table = Table(EVIL, [EVIL], [[EVIL]], note=EVIL).block()
    (tmp_path / "compare").mkdir()
    svg = '<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'
    (tmp_path / "compare" / "bad.svg").write_text(svg)
    blocks = [table, {"text": [EVIL]}, {"claim": [EVIL]}, {"quotes": [[EVIL, EVIL]]}]
    blocks.append({"figures": ["bad.svg"], "caption": EVIL})
    blocks.append({"details": EVIL, "blocks": list(blocks)})
    page = report.write_section(tmp_path, EVIL.replace("/", ""), EVIL, 1, blocks).read_text()
    assert "<script" not in page and "alert(1)" in page
    assert all(source.startswith("data:image/") for source in re.findall(r'<img src="([^"]*)"', page))
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)[1]
    assert "default-src 'none'" in policy and "img-src data:" in policy and "script-src" not in policy
    assert page.index("Content-Security-Policy") < page.index("<style>")


def test_markdown_and_terminal_take_no_orders_from_names(capsys):
    table = Table("t", ["a|b"], [[EVIL + "\x1b[31m\n# x"]])
    assert "<script" not in table.markdown() and "\\|" in table.markdown() and "\n# x" not in table.markdown()
    report.say(table.text() + "\x1b]0;title\x07")
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "content",
    ['{"name": "x", "title": "x", "order": 1, "html": "<p>"}', '{"name": 1}', "[]", "{",
     '{"name": "x", "title": "x", "order": 1, "blocks": [{"text": "no list"}]}'],
)  # fmt: skip
def test_what_is_no_section_is_one_sentence(tmp_path, content):
    folder = tmp_path / "compare" / "sections"
    folder.mkdir(parents=True)
    (folder / "bad.json").write_text(content)
    with pytest.raises(DataError, match=r"bad\.json") as e:
        report.build_report(tmp_path)
    assert "\n" not in str(e.value)


def test_figures_come_from_the_folder_alone(tmp_path):
    (tmp_path / "outside.svg").write_text("<svg></svg>")
    for file in ("../outside.svg", str(tmp_path / "outside.svg"), "none.svg", "sections/x.json"):
        with pytest.raises(ValueError, match="has no figure"):
            report.write_section(tmp_path, "x", "x", 1, [{"figures": [file]}])


def test_a_figure_follows_the_theme_of_the_page(tmp_path):
    (tmp_path / "a.svg").write_text(f'<svg width="1"><text style="fill: {report.INK}">x</text></svg>')
    source = report.figure_source(tmp_path, "a.svg")
    svg = base64.b64decode(source.partition("base64,")[2]).decode()
    assert "fill: currentColor" in svg and "prefers-color-scheme:dark" in svg


def test_the_page_is_made_again_from_its_sections(tmp_path, capsys):
    report.write_section(tmp_path, "x", "Only one", 1, [])
    (tmp_path / "compare" / "report.html").unlink()
    report.main([str(tmp_path)])
    assert "Only one" in (tmp_path / "compare" / "report.html").read_text()
    assert json.loads((tmp_path / "compare" / "sections" / "x.json").read_text())["blocks"] == []
    for argv in ([], [str(tmp_path / "nowhere")], [str(tmp_path), "twice"]):
        with pytest.raises(SystemExit) as e:
            report.main(argv)
        assert str(e.value).startswith("error: ")
