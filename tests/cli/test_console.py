"""Texts of others are shown and not obeyed."""

import pytest
import typer

from bridge_stg.cli import console
from bridge_stg.cli.tables import grounding_table, metrics_table
from bridge_stg.errors import ConfigError, OutputError

NAUGHTY = "[/a] [c] [bold]x :warning: \x1b[31m \u2028 \u202e \x9b \ud800"
SHOWN = r"[/a] [c] [bold]x :warning: \x1b[31m \u2028 \u202e \x9b \ud800"


def test_control_signs_become_escapes_and_everything_else_stays():
    assert console.printable(NAUGHTY) == SHOWN
    plain = "日本語\u3000é 👩\u200d🚀 \u00a0 $x^$ \\x1b"
    assert console.printable(plain) == plain
    assert console.printable("a\nb\tc\r") == r"a\nb\tc\r" and console.printable("a\nb\tc\r", lines=True) == "a\nb\tc\\r"


def test_lines_on_both_streams_are_plain(capsys):
    console.note(NAUGHTY)
    console.echo(NAUGHTY)
    assert capsys.readouterr() == (SHOWN + "\n", SHOWN + "\n")


def test_tables_show_tiers_and_sentences_as_they_are(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    row = dict.fromkeys(("m_tIoU", "m_vIoU", "vIoU@0.3", "vIoU@0.5", "gt_vIoU"), 0.5)
    console.show_table(metrics_table({"all": row, "tiers": {NAUGHTY: row}}))
    console.show_table(grounding_table([(NAUGHTY, (0.0, 1.0), (0.0, 1.0), 1.0, 1.0)]))
    assert capsys.readouterr().out.count(SHOWN) == 2


def test_json_that_no_parser_takes_is_not_printed(capsys):
    with pytest.raises(OutputError, match="cannot be printed as JSON: it holds a number that is not finite"):
        console.echo_json({"m_tIoU": float("nan")})
    console.echo_json({"id": NAUGHTY})
    assert capsys.readouterr().out.isascii()


def test_settings_are_json_or_text():
    assert console.read_settings(["keep=1.0", "gate=False", "source=text", "a="]) == {
        "keep": 1.0,
        "gate": "False",
        "source": "text",
        "a": "",
    }
    for pair, message in (("keep=" + "9" * 5000, "too many digits"), ("keep=" + "[" * 10**5, "nested too deeply")):
        with pytest.raises(ConfigError, match=f"--set keep: the value cannot be read, .*{message}"):
            console.read_settings([pair])
    with pytest.raises(ConfigError, match="--set gives 'keep' twice"):
        console.read_settings(["keep=1", "keep=0.5"])
    with pytest.raises(typer.BadParameter, match="is not key=value"):
        console.read_settings(["keep"])


def test_the_console_of_stderr_reads_no_markup():
    with console.stderr.capture() as captured:
        console.stderr.print("[/a] :warning: [c]")
    assert captured.get() == "[/a] :warning: [c]\n"
