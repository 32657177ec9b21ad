"""Every measured number that the project shows comes from a committed result file."""

import re
from pathlib import Path

import pytest

from benchmarks import __main__ as command
from benchmarks import report
from benchmarks.registry import BACKWARD, BOTH, FORWARD
from benchmarks.resultfile import ResultFile

ROOT = Path(__file__).parents[1]
#: A number with a unit of time, memory or speed, or a ratio.
MEASURED = re.compile(r"\d[\d.,]*\s?(µs|ms|s|minutes|MiB|GiB|tokens/s|TFLOP/s|GB/s|×)(?![\w/])")


def test_readme_and_docs_are_what_the_results_say():
    command.main(["report", "--check"])
    assert {path.name for path in report.with_blocks()} == {"README.md", "results.md", "limits.md"}


@pytest.mark.parametrize(
    "page", ["README.md", "docs/results.md", "docs/limits.md", "docs/backends.md", "docs/benchmarks/README.md"]
)
def test_no_number_is_typed_by_hand(page):
    text = report.BLOCK.sub("", (ROOT / page).read_text())
    assert not [match[0] for match in MEASURED.finditer(text) if match[0] not in ("100 µs",)]


def test_what_counts_as_a_number():
    found = [
        match[0] for match in MEASURED.finditer("576 → 1536, 9.73 ms, 0.81 × PEFT, 512 tokens, 1 % of, 2 CPU cores")
    ]
    assert found == ["9.73 ms", "0.81 ×"]


@pytest.fixture
def results(tmp_path):
    folder = tmp_path / "results"
    file = ResultFile(folder / "lora_linear_cpu.jsonl")
    file.begin(
        "lora_linear", {"device": "cpu", "cpu": "a processor", "threads": "2"}, {"torch.float32": 1e11, "bytes": 1e10}
    )
    facts = {"M": 512, "K": 64, "N": "32", "R": 16, "dtype": "float32", "p": 0.0}
    rows = [
        facts | {"provider": provider, "mode": mode, "p20_us": 900.0, "p50_us": 1000.0 + 500 * slower, "p80_us": 1900.0,
                 "rounds": 9, "of_bare": 1 + 0.5 * slower, "of_peft": 1 / 1.5 + slower / 3, "of_floor": 2.0}
        for slower, provider in enumerate(("bare linear", "PEFT"))
        for mode in (FORWARD, BACKWARD, BOTH)
    ]  # fmt: skip
    rows += [row | {"provider": "ours, reference"} for row in rows[:3]]
    rows += [facts | {"provider": "Unsloth", "skipped": "unsloth is not installed"}]
    rows += [facts | {"provider": "someone", "error": "y: max error 1 > 0.1"}]
    file.add("M=512 64→32 R=16 f32 p=0", rows)
    return folder


class TestReport:
    def test_page(self, results, tmp_path):
        docs = tmp_path / "docs"
        command.main(["report", "--results", str(results), "--docs", str(docs)])
        page = (docs / "lora_linear_cpu.md").read_text()
        for words in (
            "a processor, 2 threads", "0.10 TFLOP/s float32", "Unsloth (unsloth is not installed)",
            "| someone | wrong: y: max error 1 > 0.1 |",
            "| PEFT | 1.50 ms | 1.50 ms | 1.50 ms | 67% | 1.50 | 1.00 | 2.00 |",
        ):  # fmt: skip
            assert words in page
        command.main(["report", "--results", str(results), "--docs", str(docs), "--check"])
        (docs / "lora_linear_cpu.md").write_text(page.replace("1.50 ms", "1.40 ms", 1))
        with pytest.raises(
            SystemExit, match=r"expected what the results say, got another text in .*lora_linear_cpu.md"
        ):
            command.main(["report", "--results", str(results), "--docs", str(docs), "--check"])

    def test_blocks(self, results, tmp_path):
        (results / "demo_cpu.md").write_text("| a |\n|---|\n")
        readme = tmp_path / "README.md"
        readme.write_text(
            "# Title\n<!-- lora_linear_cpu.jsonl: layers -->\nold\n<!-- end -->\n"
            "- item\n  <!-- demo_cpu.md -->\n  <!-- end -->\nend\n"
        )
        command.main(["report", "--results", str(results), "--docs", str(tmp_path), "--fill", str(readme)])
        text = readme.read_text()
        assert "| 64 | 32 | float32 | 0 | 1.00 ms | – | 1.50 ms | 1.00 ms | 0.67 |" in text
        assert "Over all 1 shapes: 0.67 × PEFT's time." in text
        assert "- item\n  <!-- demo_cpu.md -->\n  | a |\n  |---|\n  <!-- end -->\nend\n" in text
        readme.write_text("<!-- no_such.jsonl: layers -->\n<!-- end -->\n")
        with pytest.raises(
            ValueError, match=r"expected a file in .*results and one of layers, .*gains, got no_such.jsonl: layers"
        ):
            command.main(["report", "--results", str(results), "--docs", str(tmp_path), "--fill", str(readme)])

    def test_no_results(self, tmp_path):
        with pytest.raises(SystemExit, match=r"expected result files \(\*.jsonl\) in .*, got none"):
            command.main(["report", "--results", str(tmp_path), "--docs", str(tmp_path)])
