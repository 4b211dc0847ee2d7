"""Figures in the documentation are those of docs/data."""

import statistics

import pytest

from docs import pictures, tables

TABLES = tables.load_tables()


def test_every_page_holds_what_its_tables_render_to(capsys):
    assert tables.main(["--check"]) == 0, capsys.readouterr().err


def test_a_changed_figure_is_found(tmp_path, monkeypatch, capsys):
    page = tmp_path / "page.md"
    page.write_text(tables.fill("<!-- table: headline -->\n<!-- /table -->\n", TABLES).replace("1.040", "1.041"))
    monkeypatch.setattr(tables, "PAGES", (page,))
    monkeypatch.setattr(tables, "DOCS", tmp_path / "docs")
    monkeypatch.setattr(tables, "load_tables", lambda: TABLES)
    assert tables.main(["--check"]) == 1 and "page.md" in capsys.readouterr().err
    assert tables.main([]) == 0 and "1.040" in page.read_text()


@pytest.mark.parametrize("name", TABLES)
def test_a_table_says_where_its_figures_are_from(name):
    table = TABLES[name]
    assert [field for field in tables.FIELDS if not table.get(field)] == []
    assert {len(row) for row in table["rows"]} == {len(table["columns"])}


def test_a_figure_keeps_its_digits():
    cells = [tables.Number(text) for text in ("1.040", "0.864", "8192", "0", "1369.50")]
    assert [tables.show_cell(cell) for cell in cells] == ["1.040", ".864", "8,192", "0", "1,369.50"]
    assert tables.show_cell(cells[:2]) == "1.040; .864"


def _texts(row, first):
    return [float(cell) for cell in row[first : first + 6]]


@pytest.mark.parametrize(
    ("name", "rows", "error"),
    # each text and the mean are rounded to two digits behind the point, and to four digits where there are that many
    [("tail", slice(1, None), 6e-4), *((name, slice(None), 9e-3) for name in ("perplexity", "rivals"))],
)
def test_means_are_those_of_the_six_texts(name, rows, error):
    for row in TABLES[name]["rows"][rows]:
        assert statistics.mean(_texts(row, 2)) == pytest.approx(float(row[8]), abs=error, rel=3e-4), row


def test_pictures_show_the_tables_figures(tmp_path):
    default, rivals = (pictures.rows_of(TABLES[name]) for name in ("perplexity", "rivals"))
    assert default[0] == {
        "method": "dense", "setting": "bare", "keep": None, "perplexity": 16.28, "bytes_read": 90 * 2**20
    }  # fmt: skip
    shown = {row["method"] for row in pictures.with_default(rivals, default)}
    assert shown == {row[0] for row in TABLES["rivals"]["rows"]} | {"oracle-scores", "spotlight", "spotlight, 64 bits"}
    assert pictures.main(tmp_path) == 0
    assert {file.name: file.read_bytes()[1:4] for file in tmp_path.iterdir()} == dict.fromkeys(
        ("perplexity.png", "comparison.png"), b"PNG"
    )


def test_means_at_32768_tokens_are_those_of_the_four_texts_that_every_row_has():
    for row in TABLES["tail-32k"]["rows"][1:]:
        assert statistics.mean(float(cell) for cell in row[2:6]) == pytest.approx(float(row[7]), abs=6e-4), row


def test_the_readmes_figures_are_those_of_the_results():
    tail = {(row[0], row[1]): float(row[8]) for row in TABLES["tail"]["rows"][1:]}
    names = ("spotlight, tail estimated", "oracle by probability", "spotlight")
    for name, row in zip(names, TABLES["headline"]["rows"], strict=True):
        assert [float(cell) for cell in row[1:]] == [tail[name, share] for share in ("0.5 %", "2 %", "10 %")]
    tasks = TABLES["tasks"]["rows"]
    for row, share in ((tasks[0], "2 %"), (tasks[1], "0.5 %")):
        assert [float(row[3]), float(row[4])] == [tail[names[0], share], tail[names[1], share]]
        assert str(row[5]).split()[0] == f"{tail[names[2], share]:.3f}"
    long = {row[0]: _texts(row, 1) for row in TABLES["perplexity-32k"]["rows"]}
    ratios = {
        name: statistics.mean(one / dense for one, dense in zip(row, long["dense"], strict=True))
        for name, row in long.items()
    }
    far = {(row[0], row[1]): float(row[7]) for row in TABLES["tail-32k"]["rows"][1:]}
    for row, share in ((tasks[2], "2 %"), (tasks[3], "0.5 %")):
        assert [float(row[3]), float(row[4])] == [far[names[0], share], far[names[1], share]]
        assert str(row[5]).split()[0] == f"{far[names[2], share]:.3f}"
    found = [float(tasks[4][3]), float(tasks[4][4]), float(str(tasks[4][5]).split()[4])]
    expected = [ratios[name] for name in ("spotlight", "oracle by probability", "oracle by summed scores")]
    assert found == pytest.approx(expected, abs=6e-4)
    masses = {row[0]: [float(cell[1]) for cell in row[1:]] for row in TABLES["by-length"]["rows"]}
    spotlight = next(row for name, row in masses.items() if "A:" in name)
    assert [float(tasks[6][3]), float(tasks[6][4])] == [spotlight[3], masses["oracle by probability"][3]]
